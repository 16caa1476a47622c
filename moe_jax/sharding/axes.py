"""Names of the logical axes of parameters and activations."""

import math

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
LABELS = "labels"
NEW_TOKENS = "new_tokens"

BATCH = "activation_batch"
LENGTH = "activation_length"
ACTIVATION_EMBED = "activation_embed"
ACTIVATION_MLP = "activation_mlp"
CACHE_KV_HEADS = "cache_kv_heads"
HEAD_WIDTH = "head_width"

HIDDEN_AXES = (BATCH, LENGTH, ACTIVATION_EMBED)
MLP_HIDDEN_AXES = (BATCH, LENGTH, ACTIVATION_MLP)


def blocks(inputs: str) -> str:
    """Logical axis of the blocks of a quantized kernel's inputs."""
    return f"{inputs}_blocks"


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Constrains an activation's sharding over the ambient mesh (`jax.set_mesh`), if any."""
    return nn.with_logical_constraint(x, axes)


def num_shards(axis: str) -> int:
    """Number of shards of an activation's axis on the ambient mesh; 1 without a mesh."""
    spec = nn.logical_to_mesh_axes((axis,)) or (None,)
    mesh = jax.sharding.get_abstract_mesh()
    names = (spec[0],) if isinstance(spec[0], str) else spec[0] or ()
    return math.prod(mesh.shape.get(name, 1) for name in names)
