"""Named leaves of trees of arrays: strict comparison, checksums and snapshots."""

import collections
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from moe_jax.errors import CheckpointError, TrainingError


class LeafSpec(NamedTuple):
    """Shape and type of a leaf, which must match when it is restored."""

    shape: tuple[int, ...]
    dtype: str


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by path, its names joined by `/`; empty nodes are dropped."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_part(key) for key in path): leaf for path, leaf in leaves}


def nested_dict(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict whose `named_leaves` are `leaves`."""
    return unflatten_dict(dict(leaves), sep="/")


def leaf_specs(tree: Any) -> dict[str, LeafSpec]:
    """Shape and type of every leaf: of arrays, `ShapeDtypeStruct` or Orbax metadata."""
    return {
        path: LeafSpec(tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in named_leaves(tree).items()
    }


def module_of(path: str) -> str:
    """Path of the module of a leaf, without the prefix `layers` of stacked layers."""
    return "/".join(part for part in path.split("/")[:-1] if part != "layers")


def parameters_by_module(leaves: Mapping[str, LeafSpec]) -> dict[str, int]:
    """Number of parameters over all layers, by module."""
    counts: collections.Counter[str] = collections.Counter()
    for path, spec in leaves.items():
        counts[module_of(path)] += math.prod(spec.shape)
    return dict(counts)


def require_same_leaves(
    stored: Mapping[str, LeafSpec], expected: Mapping[str, LeafSpec], where: str
) -> None:
    """Requires that the leaves of a checkpoint are exactly the expected ones.

    Args:
      stored: leaves of the checkpoint.
      expected: leaves of this run or adapter.
      where: folder of the checkpoint, for the message.

    Raises:
      CheckpointError: a leaf is missing or unexpected, or has another shape or type.
    """
    for problem, names in (
        ("has no array for", [name for name in expected if name not in stored]),
        ("holds unexpected arrays:", [name for name in stored if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(
                f"{where}: {problem} {names[0]!r}{more}; the checkpoint belongs to another "
                "configuration"
            )
    for name, spec in expected.items():
        if stored[name] != spec:
            raise CheckpointError(
                f"{where}: {name!r} has shape {stored[name].shape} and type {stored[name].dtype}, "
                f"expected {spec.shape} and {spec.dtype}"
            )


def checksums(tree: Any) -> dict[str, int]:
    """Checksum of each leaf by path; it changes when any single bit does.

    It is the sum of the words' bit patterns modulo 2^32, computed on the device, and the same on
    every mesh. TensorStore compresses without a checksum, so a flipped bit would load unnoticed.
    """
    leaves = named_leaves(tree)
    sums = jax.device_get(bit_sums(list(leaves.values())))
    return {path: int(total) for path, total in zip(leaves, sums, strict=True)}


@jax.jit
def bit_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """Checksums of `checksums`, still on the device."""

    def bit_sum(leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(leaf, width)
        return jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)

    return [bit_sum(leaf) for leaf in leaves]


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"tree node without names: {key!r}")


@dataclass(frozen=True)
class Snapshot:
    """State of a tree at one moment, to be written while training continues.

    Attributes:
      tree: tree of arrays.
      finite: boolean scalar for each leaf by path, True if all values are finite; on the device.
      sums: checksum of each leaf by path; on the device.
    """

    tree: Any
    finite: Mapping[str, jax.Array]
    sums: Mapping[str, jax.Array]

    def require_finite(self, step: int) -> None:
        """Waits for the leaves and requires that all values are finite.

        Args:
          step: optimizer step of the tree, for the message.

        Raises:
          TrainingError: a leaf has a NaN or an infinity; names the first one.
        """
        for path, ok in jax.device_get(dict(self.finite)).items():
            if not np.all(ok):
                raise TrainingError(
                    f"adapter weights {path!r} are not finite at step {step}, so they are not "
                    "saved; try a lower learning rate"
                )

    def checksums(self) -> dict[str, int]:
        """Checksums of the leaves, see `leaves.checksums`; waits for the leaves."""
        return {path: int(total) for path, total in jax.device_get(dict(self.sums)).items()}


def take_snapshot(tree: Any) -> Snapshot:
    """Copies a tree of jax arrays on its devices, without waiting for them.

    The tree may be donated to the next step at once. While the snapshot exists, the devices hold
    the leaves twice.
    """
    leaves = named_leaves(tree)
    copy = _compiled_copy(tuple(leaf.sharding for leaf in leaves.values()))
    copies, statistics = copy(list(leaves.values()))
    return _snapshot(jax.tree.unflatten(jax.tree.structure(tree), copies), leaves, statistics)


def snapshot_without_copy(tree: Any) -> Snapshot:
    """Snapshot of a tree that is not donated or changed before it is written."""
    leaves = named_leaves(tree)
    return _snapshot(tree, leaves, _statistics(list(leaves.values())))


def _snapshot(tree: Any, paths: Iterable[str], statistics: Any) -> Snapshot:
    for scalar in jax.tree.leaves(statistics):
        scalar.copy_to_host_async()
    finite, sums = (dict(zip(paths, values, strict=True)) for values in statistics)
    return Snapshot(tree, finite, sums)


@functools.lru_cache(maxsize=16)
def _compiled_copy(shardings: tuple[jax.sharding.Sharding, ...]) -> Any:
    """Compiled function that copies leaves and computes their `_statistics`."""

    def copy(leaves: list[jax.Array]) -> Any:
        # `jnp.copy`, since jit would return the argument itself, which is donated to the next step.
        return [jnp.copy(leaf) for leaf in leaves], _statistics(leaves)

    return jax.jit(copy, out_shardings=(list(shardings), None))


@jax.jit
def _statistics(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Boolean scalars that are True if a leaf is finite, and checksums."""
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves], bit_sums(leaves)
