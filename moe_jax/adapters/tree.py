"""The projections of a decoder layer that adapters can target."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_jax.layers.names import ADAPTERS

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
TARGET_MODULES = ATTENTION_MODULES + MLP_MODULES


# FIXME docstring of the merged adapters.sites:
# """Where adapters attach to a decoder layer, and how their variables are named.
#
# Inside the model the variables of the adapter `x` at the site `q_proj` are at
# `layers/self_attn/q_proj/adapter_x/...`, next to the base parameters' own paths. Outside, where
# adapters are optimised, saved and exchanged one by one, the tree is keyed by adapter first:
# `{"x": {"layers": {"self_attn": {"q_proj": {...}}}}}`. These functions go from one to the other.
# """


MOE = "moe"
"""The site, inside `mlp`, of adapters that replace the FFN as a whole."""

SCORE = "score"
"""The site, behind the last norm, of the score heads of adapters that classify."""

SITES = frozenset({*TARGET_MODULES, MOE, SCORE})
_PREFIX = "adapter_"


def module_name(adapter: str) -> str:
    """The name of the Linen module of `adapter` at any site."""
    return _PREFIX + adapter


def expert_name(adapter: str, index: int | str) -> str:
    """What an expert is called wherever people or other programs read of it."""
    return f"moe.{adapter}.experts.{index}"


def by_adapter(collection: Mapping[str, Any]) -> dict[str, Any]:
    """From a Linen collection to `{adapter: tree}`; leaves are passed through."""
    result: dict[str, dict[tuple[str, ...], Any]] = {}
    for path, leaf in flatten_dict(collection).items():
        (marker,) = [part for part in path if part.startswith(_PREFIX)]
        rest = tuple(part for part in path if part != marker)
        result.setdefault(marker.removeprefix(_PREFIX), {})[rest] = leaf
    return {name: unflatten_dict(flat) for name, flat in result.items()}


def to_collection(adapters: Mapping[str, Any]) -> dict[str, Any]:
    """From `{adapter: tree}` back to a Linen collection."""
    result = {}
    for name, tree in adapters.items():
        for path, leaf in flatten_dict(tree).items():
            # The first site on the path is the outer one: `moe` before the `gate_proj` in it.
            at = next(i for i, part in enumerate(path) if part in SITES) + 1
            result[(*path[:at], module_name(name), *path[at:])] = leaf
    return unflatten_dict(result)


# FIXME docstring of the merged adapters.leaf:
# """A trainable leaf with its logical axes."""


def adapter_leaf(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
) -> jax.Array:
    """A trainable float32 leaf of `module` in the `adapters` collection.

    Linen's `param` only knows the `params` collection, which here is frozen.
    """

    def make() -> Any:
        boxed = nn.with_logical_partitioning(init, axes)
        return boxed(module.make_rng(ADAPTERS), shape, jnp.float32)

    variable: Any = module.variable(ADAPTERS, name, make)
    return variable.value
