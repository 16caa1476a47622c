"""Adapters: everything that is trained beside the frozen model.

    method.py       the interface of an adapter method
    lora/           LoRA, rsLoRA and DoRA; low-rank pairs of one or of E experts
    mixlora.py      MixLoRA: experts on the FFN as a whole
    expert_slots.py the hidden activations of its experts, and their sum
    fused_slots.py  the same in GPU kernels; fused_slot_arrays.py, fused_slot_kernels.py
    mixtures/       LoRAMoE and MoLA: experts on each projection
    routing/        routers, their statistics and auxiliary losses
    rows.py         the rows of a batch that belong to each adapter
    projection.py   a frozen projection with the deltas of its adapters
    score_head.py   heads of classification adapters
    new_tokens.py   rows of new tokens
    tree.py         names and trees of the adapters' variables

A new method is one file with a dataclass derived from `AdapterMethod` and decorated with
`@METHODS.register("its_name")`; import it here.
"""

from moe_jax.adapters import routing as _routing  # noqa: F401  registers routers and losses
from moe_jax.adapters.lora.lora import LoraConfig as LoraConfig
from moe_jax.adapters.method import METHODS as METHODS
from moe_jax.adapters.mixlora import MixLoraConfig as MixLoraConfig
from moe_jax.adapters.mixtures.loramoe import LoraMoeConfig as LoraMoeConfig
from moe_jax.adapters.mixtures.mola import MolaConfig as MolaConfig
