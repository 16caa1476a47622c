"""Trees of arrays as leaves with names, and the strict comparison of two such sets of leaves."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import CheckpointError, TrainingError


class LeafSpec(NamedTuple):
    """What a leaf must agree on to be the same leaf."""

    shape: tuple[int, ...]
    dtype: str


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by their path, its parts joined by `/`; empty nodes leave no trace."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(_part(key) for key in path): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict whose `named_leaves` are `leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def leaf_specs(tree: Any) -> dict[str, LeafSpec]:
    """Shape and dtype of every leaf that has both (arrays, `ShapeDtypeStruct`, Orbax metadata)."""
    return {
        path: LeafSpec(tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in named_leaves(tree).items()
    }


def require_same_leaves(
    found: Mapping[str, LeafSpec], expected: Mapping[str, LeafSpec], where: str
) -> None:
    """Refuses a checkpoint whose leaves are not exactly the expected ones.

    Args:
      found: the checkpoint's leaves.
      expected: the leaves that this run or adapter has.
      where: the checkpoint's folder, for the message.

    Raises:
      CheckpointError: a leaf is missing, is left over, or has another shape or dtype.
    """
    for problem, names in (
        ("has no array for", [name for name in expected if name not in found]),
        ("holds arrays that nothing here uses:", [name for name in found if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{where}: {problem} {names[0]!r}{more}; it is not a match")
    for name, spec in expected.items():
        if found[name] != spec:
            raise CheckpointError(
                f"{where}: {name!r} has shape {found[name].shape} and type {found[name].dtype}, "
                f"expected {spec.shape} and {spec.dtype}"
            )


def checksums(tree: Any) -> dict[str, int]:
    """A number per leaf that changes when any one of its bits does.

    The sum of the words' bit patterns modulo 2^32: the same on every mesh, and computed where the
    leaf lies. TensorStore compresses without a checksum, so a flipped bit would load unnoticed.
    """
    leaves = named_leaves(tree)
    sums = jax.device_get(bit_sums(list(leaves.values())))
    return {path: int(total) for path, total in zip(leaves, sums, strict=True)}


@jax.jit
def bit_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    """The numbers of `checksums`, still on the device."""

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
    raise TypeError(f"a tree node of a kind without names: {key!r}")


# FIXME docstring of the merged checkpoints.snapshot:
# """Trees of arrays as they are at one moment, to be written while training goes on."""


@dataclass(frozen=True)
class Snapshot:
    """See `take_snapshot` and `without_copy`.

    Attributes:
      tree: the leaves.
      finite: by path, whether all numbers of a leaf are finite; still on the device.
      sums: by path, a leaf's checksum; still on the device.
    """

    tree: Any
    finite: Mapping[str, jax.Array]
    sums: Mapping[str, jax.Array]

    def require_finite(self, step: int) -> None:
        """Waits for the leaves to be there, and refuses numbers that are not finite.

        Args:
          step: after which the tree was like this.

        Raises:
          TrainingError: names the first leaf that holds a NaN or an infinity.
        """
        for path, ok in jax.device_get(dict(self.finite)).items():
            if not np.all(ok):
                raise TrainingError(
                    f"adapter weights {path!r} are not finite at step {step}, so they are not "
                    "saved; try a lower learning rate"
                )

    def checksums(self) -> dict[str, int]:
        """Those of `leaves.checksums`; waits for the leaves to be there."""
        return {path: int(total) for path, total in jax.device_get(dict(self.sums)).items()}


def take_snapshot(tree: Any) -> Snapshot:
    """Copies a tree of jax arrays where it lies, without waiting for the device.

    The tree may be donated to the next step at once. Until the snapshot is dropped, the device
    holds its leaves twice.
    """
    leaves = named_leaves(tree)
    copy = _copying(tuple(leaf.sharding for leaf in leaves.values()))
    copies, facts = copy(list(leaves.values()))
    return _snapshot(jax.tree.unflatten(jax.tree.structure(tree), copies), leaves, facts)


def without_copy(tree: Any) -> Snapshot:
    """The same of a tree that nobody changes until it is written: its own leaves."""
    leaves = named_leaves(tree)
    return _snapshot(tree, leaves, _facts(list(leaves.values())))


def _snapshot(tree: Any, paths: Iterable[str], facts: Any) -> Snapshot:
    for fact in jax.tree.leaves(facts):
        fact.copy_to_host_async()
    finite, sums = (dict(zip(paths, values, strict=True)) for values in facts)
    return Snapshot(tree, finite, sums)


@functools.lru_cache(maxsize=16)
def _copying(shardings: tuple[jax.sharding.Sharding, ...]) -> Any:
    """A function that copies leaves and finds their `_facts`, compiled once a tree."""

    def copy(leaves: list[jax.Array]) -> Any:
        # `jnp.copy`, since jit would hand on the argument itself, which is donated soon.
        return [jnp.copy(leaf) for leaf in leaves], _facts(leaves)

    return jax.jit(copy, out_shardings=(list(shardings), None))


@jax.jit
def _facts(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Whether each leaf is finite, and its checksum."""
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves], bit_sums(leaves)
