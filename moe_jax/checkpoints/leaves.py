"""Trees of arrays as leaves with names, and the strict comparison of two such sets of leaves."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import CheckpointError


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
