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
    (axes.VOCAB, "tensor"),
    (axes.EMBED, "fsdp"),
    (axes.HEADS, "tensor"),
    (axes.KV_HEADS, "tensor"),
    (axes.MLP, "tensor"),
    (axes.LAYERS, None),
    (axes.EXPERTS, None),
    (axes.RANK, None),
    (axes.NORM, None),
)
"""Parameters split their wide axes; the small ones (experts, rank, layers) stay whole."""

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
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    shapes = nn.meta.unbox(boxed)

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct, spec: PartitionSpec) -> NamedSharding:
        for size, entry in zip(leaf.shape, spec, strict=False):
            names: tuple[str, ...] = ()
            if entry is not None:
                names = (entry,) if isinstance(entry, str) else tuple(entry)
            parts = math.prod(mesh.shape[name] for name in names)
            if size % parts:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise DeviceError(
                    f"config.mesh.{'/'.join(names)}: {parts} devices cannot split {where} "
                    f"{leaf.shape} evenly along its axis of {size}; choose a divisor of {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, shapes, specs)
