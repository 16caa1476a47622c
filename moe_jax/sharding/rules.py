"""From logical axes to axes of the mesh; the only place that knows both."""

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
    (axes.blocks(axes.EMBED), "fsdp"),
    (axes.blocks(axes.HEADS), "tensor"),
    (axes.blocks(axes.MLP), "tensor"),
)
"""In order of priority; a mesh axis is used once per array.

Parameters split their wide axes. The rank of an adapter is split only where the pair's wide axis
leaves `fsdp` free (B of gate and up, A of down), which keeps the optimiser's moments small.
"""

OPTIONAL_AXES = frozenset(
    {axes.RANK, *(axes.blocks(inputs) for inputs in (axes.EMBED, axes.HEADS, axes.MLP))}
)
"""Left whole where the devices do not divide them; for the others that is an error."""

BATCH_SPEC = PartitionSpec(("data", "fsdp"))
"""Rows of a batch."""


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """A tree of `NamedSharding` for abstract variables that carry their logical axes.

    Args:
      boxed: what `jax.eval_shape(model.init, ...)` returns: leaves boxed with logical axes.
      mesh: the mesh.

    Raises:
      DeviceError: an axis of a variable cannot be split evenly; names both.
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
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise DeviceError(
                    f"config.mesh.{'/'.join(names)}: {parts} devices cannot split {where} "
                    f"{leaf.shape} evenly along its axis of {size}; choose a divisor of {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, shapes, logical_specs)
