"""The letters of every shape in this library, and the logical axes they are sharded by.

    B batch rows          S sequence positions     T = B * S tokens
    D model width         F FFN width              V vocabulary
    H query heads         K key/value heads        Q head width
    L decoder layers      E experts                R LoRA rank
    C chosen-expert slots (the k of top-k)

Model code names logical axes only; `moe_jax.sharding.rules` maps them to the axes of the mesh.
"""

import flax.linen as nn
import jax

LAYERS = "layers"
VOCAB = "vocab"
EMBED = "embed"
HEADS = "heads"
KV_HEADS = "kv_heads"
MLP = "mlp"
EXPERTS = "experts"
RANK = "rank"
NORM = "norm"

BATCH = "activation_batch"
LENGTH = "activation_length"
ACTIVATION_EMBED = "activation_embed"
ACTIVATION_MLP = "activation_mlp"

HIDDEN_AXES = (BATCH, LENGTH, ACTIVATION_EMBED)
MLP_HIDDEN_AXES = (BATCH, LENGTH, ACTIVATION_MLP)

PARAMS = "params"
"""Linen collection of the frozen base parameters."""
ADAPTERS = "adapters"
"""Linen collection of every trainable leaf."""
ROUTER = "router"
"""Linen collection into which the layers sow their routing statistics."""


def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Fixes how an activation is laid out over the ambient mesh (`jax.set_mesh`), if there is one."""
    return nn.with_logical_constraint(x, axes)
