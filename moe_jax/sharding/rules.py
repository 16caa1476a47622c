"""Rules from logical axes to mesh axes."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import DeviceError
from moe_jax.sharding import axes

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    (axes.BATCH, ("data", "fsdp")),
    (axes.LENGTH, None),
    (axes.ACTIVATION_EMBED, None),
    (axes.ACTIVATION_MLP, "tensor"),
    (axes.CACHE_KV_HEADS, "tensor"),
    (axes.HEAD_WIDTH, None),
    (axes.VOCAB, "tensor"),
    (axes.EMBED, "fsdp"),
    (axes.HEADS, "tensor"),
    (axes.KV_HEADS, "tensor"),
    (axes.MLP, "tensor"),
    (axes.LAYERS, None),
    (axes.EXPERTS, None),
    (axes.RANK, "fsdp"),
    (axes.NORM, None),
    (axes.LABELS, None),
    (axes.NEW_TOKENS, None),
    (axes.blocks(axes.EMBED), "fsdp"),
    (axes.blocks(axes.HEADS), "tensor"),
    (axes.blocks(axes.MLP), "tensor"),
)
"""Mesh axes of each logical axis, by priority; an array uses a mesh axis at most once.

Parameters are split along their wide axes. The rank of an adapter is split only if the wide axis
does not use `fsdp` (B of gate and up, A of down), which keeps the optimizer's moments small.
"""

OPTIONAL_AXES = frozenset(
    {axes.RANK, *(axes.blocks(inputs) for inputs in (axes.EMBED, axes.HEADS, axes.MLP))}
)
"""Axes that are replicated if the devices do not divide them; for others that is an error."""

BATCH_SPEC = PartitionSpec(("data", "fsdp"))
"""Sharding of the rows of a batch."""


def num_row_shards(mesh: Mesh | None) -> int:
    """Number of shards of the rows of a batch, by `BATCH_SPEC`; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of abstract variables, from their logical axes.

    Args:
      boxed: result of `jax.eval_shape(model.init, ...)`, leaves boxed with logical axes.
      mesh: the mesh.

    Raises:
      DeviceError: the devices do not divide an axis of a variable.
    """
    logical_specs = nn.get_partition_spec(boxed)
    shapes = nn.meta.unbox(boxed)

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct, logical: PartitionSpec) -> NamedSharding:
        spec = list(nn.logical_to_mesh_axes(tuple(logical), RULES) or ())
        for i, (size, name, entry) in enumerate(zip(leaf.shape, logical, spec, strict=True)):
            names: tuple[str, ...] = ()
            if entry is not None:
                names = (entry,) if isinstance(entry, str) else tuple(entry)
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts and name in OPTIONAL_AXES:
                spec[i] = None
            elif size % parts:
                leaf_path = jax.tree_util.keystr(path, simple=True, separator="/")
                raise DeviceError(
                    f"mesh axis {'/'.join(names)}: {parts} devices cannot split {leaf_path} "
                    f"{leaf.shape} evenly along its axis of {size}; choose a divisor of {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, shapes, logical_specs)
