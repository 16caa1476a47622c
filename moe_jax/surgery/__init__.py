"""Adapters made of adapters and of checkpoints; each says what is exact, and measures the rest.

    upcycle      a LoRA becomes a mixture of experts that start as its copies
    from_dense   a checkpoint and its fine-tuned version become a LoRA
    prune        the experts that some text uses least are dropped
    grow         experts are split into more
    merge        groups of experts become one

One operation a file. Each returns a `SurgeryOutcome`, and writes an ordinary adapter's folder if it
is given one; a run goes on from there with `adapters.NAME.start_from`.
"""

from moe_jax.surgery.from_dense import from_dense as from_dense
from moe_jax.surgery.grow import grow as grow
from moe_jax.surgery.merge import merge as merge
from moe_jax.surgery.outcome import SurgeryOutcome as SurgeryOutcome
from moe_jax.surgery.prune import prune as prune
from moe_jax.surgery.upcycle import upcycle as upcycle
