"""Trees of arrays as they are at one moment, to be written while training goes on."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoints.leaves import bit_sums, named_leaves
from moe_jax.errors import TrainingError


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
