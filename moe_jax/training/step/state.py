"""What changes from one step to the next."""

from typing import Any

import flax.struct
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.checkpoints.leaves import leaf_specs, named_leaves
from moe_jax.training.step.loss_scale import LossScale


@flax.struct.dataclass
class TrainState:
    """Everything that a run needs to go on, besides the frozen base and the data's state.

    Attributes:
      step: int32 [], optimiser steps done (skipped ones included).
      adapters: `{name: tree}`, float32.
      opt_state: state of `build_optimizer`'s transform.
      loss_scale: `{name: LossScale}`; empty unless computing in float16.
    """

    step: jax.Array
    adapters: dict[str, Any]
    opt_state: Any
    loss_scale: dict[str, LossScale]


def state_shardings(abstract_state: TrainState, adapter_shardings: Any, mesh: Mesh) -> TrainState:
    """Shardings for a training state: an optimiser's moment lies where its parameter does.

    A leaf whose path ends in an adapter's path, and whose shape is the same, is laid out like it;
    everything else (counters, factored moments) is on every device.
    """
    by_path = named_leaves(adapter_shardings)
    shapes = {path: leaf.shape for path, leaf in named_leaves(abstract_state.adapters).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: Any, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        for own, candidate in by_path.items():
            if where.endswith("/" + own) and leaf.shape == shapes[own]:
                return candidate
        return replicated

    return jax.tree_util.tree_map_with_path(sharding, abstract_state)


def carried_over(state: TrainState, abstract: TrainState) -> TrainState:
    """The part of `state` that a program of fewer adapters goes on with, the same arrays.

    The arrays of the other adapters are freed: do not use `state` again.

    Args:
      state: of more adapters.
      abstract: shapes and types of the state to be; each leaf is taken from `state` by its path.

    Raises:
      ValueError: `state` has no such leaf.
    """
    leaves, found, wanted = named_leaves(state), leaf_specs(state), leaf_specs(abstract)
    for path, spec in wanted.items():
        if found.get(path) != spec:
            raise ValueError(f"the state has no {path} of shape {spec.shape} and type {spec.dtype}")
    for path, leaf in leaves.items():
        if path not in wanted:
            leaf.delete()
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[path] for path in wanted])
