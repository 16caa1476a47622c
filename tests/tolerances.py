"""Tolerances of the tests, each named once. They are never relaxed.

Plain numbers go to `atol` with `rtol=0`; dictionaries go to `np.testing.assert_allclose` whole.
"""

import jax

# Absolute, on float32 logits against transformers; the same sums in another order.
FLOAT32_LOGITS = 1e-4

# The same logits, relative to the largest of them, for large adapters.
FLOAT32_LOGITS_OF_LARGEST = 1e-5

# The same float32 computation in another order: sharded against one device, scan against a loop,
# one batch against its micro-batches.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}

# The same for gradients, whose sums run over all tokens of a batch.
GRADIENT_ROUNDING = {"rtol": 1e-4, "atol": 1e-6}

# The same, relative to the largest gradient of a leaf, where some are many times smaller than it:
# six of the bits that float32 has.
GRADIENT_OF_LARGEST = 2**-18

# Relative to the largest: the delta rule in chunks against a loop over tokens. Its decays are
# differences of float32 sums over a chunk.
DELTA_RULE_OF_LARGEST = 2**-16

# Relative to the largest gradient of a leaf: a model with linear attention against transformers'
# in float32. Queries and keys of unit length, made of small numbers, magnify rounding.
DELTA_NET_GRADIENT_OF_LARGEST = 2**-13

# A float64 oracle against float64 code.
FLOAT64_ROUNDING = {"rtol": 1e-10, "atol": 1e-12}

# Absolute, on logits: the weights of an adapter rounded to bfloat16, and all else in float32.
BFLOAT16_TENSORS = 1e-2

# A few float32 operations against the same numbers worked out by hand, and their gradients.
FEW_OPERATIONS = {"rtol": 1e-6}
FEW_OPERATIONS_GRADIENT = {"rtol": 1e-5}

# Gradients in half precision, against a higher one on the same inputs: in bfloat16, what is kept
# and what is given are rounded once each, by at most one part in 256; in float16, by one in 2048.
BFLOAT16_GRADIENT = {"rtol": 2**-7, "atol": 1e-5}
FLOAT16_GRADIENT = {"rtol": 2**-9}

# Relative: the standard deviation of tens of thousands of random numbers, against that asked for.
OF_RANDOM_NUMBERS = 0.05

# Relative: how many rows come from either of two data sets, counted up to the middle of a window.
# Absolute: padding's share, estimated from a few batches, against that of an epoch.
WITHIN_A_WINDOW = 0.03
PADDING_SHARE = 0.005

# A float32 matrix product, whose sums are long, against float64.
FLOAT32_PRODUCT = {"rtol": 1e-5, "atol": 1e-4}

# Absolute: the same scores of a classifier, computed in a batch of another shape.
CLASSIFIER_SCORES = 1e-5

# Absolute: a product of two float32 factors of a matrix, against it.
FACTORS = 1e-6

# Relative: the norm of what a truncated decomposition leaves out, and a divergence that is
# measured in float32.
TRUNCATION = 1e-4
DIVERGENCE = 1e-3

# Absolute: numbers that are kept with six digits, and what is computed from those.
SIX_DIGITS = 1e-6
OF_SIX_DIGITS = 1e-5

# Absolute: shares that are kept in a byte, and shown with two digits.
IN_A_BYTE = 1 / 255
TWO_DIGITS = 0.01

# Relative: operations that XLA counts and bytes that it moves and plans, against written tables.
# Any release makes the same products; what it fuses, and so moves and keeps, is its own affair. The
# tables are of one release, which Python 3.11 gets; memory as jax 0.12 plans it is up to 10% off.
# Loops have counters of their own.
COMPILED_COUNTS = 0.01
COMPILED_BYTES = 0.02 if jax.__version__.startswith("0.10.") else 0.12
