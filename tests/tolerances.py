"""How close is close enough: every tolerance of the tests, named once. They are never relaxed.

Plain numbers go to `atol` with `rtol=0`; dictionaries go to `np.testing.assert_allclose` whole.
"""

# Absolute, on float32 logits against transformers; the same sums in another order.
FLOAT32_LOGITS = 1e-4

# The same float32 computation in another order: sharded against one device, scan against a loop,
# one batch against its micro-batches.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}

# The same for gradients, whose sums run over all tokens of a batch.
GRADIENT_ROUNDING = {"rtol": 1e-4, "atol": 1e-6}

# A float64 oracle against float64 code.
FLOAT64_ROUNDING = {"rtol": 1e-10, "atol": 1e-12}

# Absolute, on logits: the weights of an adapter rounded to bfloat16, and all else in float32.
BFLOAT16_TENSORS = 1e-2
