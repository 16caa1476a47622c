"""Training state, and its shardings."""

from typing import Any

import flax.struct
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.checkpoints.leaves import leaf_specs, named_leaves
from moe_jax.training.step.optimizer import LossScale


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step, except for the position in the data.

    Attributes:
      step: int32 [], optimizer steps done, skipped ones included.
      adapters: `{name: tree}`, float32.
      opt_state: state of `build_optimizer`'s transform.
      loss_scale: `{name: LossScale}`; empty unless computing in float16.
      references: adapters that are the references of others in each step, by the adapter that
        learns; they do not change.
    """

    step: jax.Array
    adapters: dict[str, Any]
    opt_state: Any
    loss_scale: dict[str, LossScale]
    references: dict[str, Any] = flax.struct.field(default_factory=dict)


def state_shardings(abstract_state: TrainState, adapter_shardings: Any, mesh: Mesh) -> TrainState:
    """Shardings of a training state: an optimizer's moments are sharded like their parameters.

    A leaf has the sharding of the adapter leaf whose path its own ends in, if the shapes are equal.
    All others (counters, factored moments) are replicated.
    """
    by_path = named_leaves(adapter_shardings)
    shapes = {path: leaf.shape for path, leaf in named_leaves(abstract_state.adapters).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        leaf_path = jax.tree_util.keystr(path, simple=True, separator="/")
        for parameter, candidate in by_path.items():
            if leaf_path.endswith("/" + parameter) and leaf.shape == shapes[parameter]:
                return candidate
        return replicated

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def restrict_state(state: TrainState, abstract: TrainState) -> TrainState:
    """The part of `state` that a program of fewer adapters continues with, without copies.

    The arrays of the other adapters are deleted: do not use `state` again.

    Args:
      state: state of more adapters.
      abstract: shapes and dtypes of the result; each leaf is taken from `state` by its path.

    Raises:
      ValueError: `state` lacks a leaf of the result.
    """
    leaves, specs, expected = named_leaves(state), leaf_specs(state), leaf_specs(abstract)
    for path, spec in expected.items():
        if specs.get(path) != spec:
            raise ValueError(f"the state has no {path} of shape {spec.shape} and type {spec.dtype}")
    for path, leaf in leaves.items():
        if path not in expected:
            leaf.delete()
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[path] for path in expected])
