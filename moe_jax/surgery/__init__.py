"""Operations that convert adapters and checkpoints to new adapters, one file an operation.

    upcycle      converts a LoRA to a mixture of experts that start as its copies
    from_dense   extracts a LoRA from a base and its fine-tuned version
    prune        drops the experts that a text uses least
    grow         splits experts into more
    merge        merges groups of experts into one

Each operation returns a `SurgeryOutcome`: the new adapter, its exactness, and measurements. With
`output` it writes the adapter's folder, which `adapters.NAME.start_from` trains on.

To add an operation, write one file with a function that returns a `SurgeryOutcome` (`prune.py` is
the shortest example), import it below, and add its flags to `moe_jax/commands/surgery.py`.
`outcome.py` opens, measures and saves adapters, and `experts.py` finds and rearranges experts in
the leaves of an adapter.
"""

from moe_jax.surgery.from_dense import from_dense as from_dense
from moe_jax.surgery.grow import grow as grow
from moe_jax.surgery.merge import merge as merge
from moe_jax.surgery.outcome import SurgeryOutcome as SurgeryOutcome
from moe_jax.surgery.prune import prune as prune
from moe_jax.surgery.upcycle import upcycle as upcycle
