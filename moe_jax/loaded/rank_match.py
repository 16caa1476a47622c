"""Ranks at which adapters have the size of other adapters of the run."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.adapters.method import AdapterMethod
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import located
from moe_jax.config.rank_match import MatchedMethod
from moe_jax.config.run import RunConfig
from moe_jax.errors import ConfigError
from moe_jax.loaded.adapter_base import expected_leaves


class MatchedRanks(NamedTuple):
    """Methods whose ranks are all numbers.

    Attributes:
      methods: method of each adapter by name.
      notes: rank and numbers of parameters of each adapter whose rank was chosen, by name.
    """

    methods: dict[str, AdapterMethod]
    notes: dict[str, str]

    def apply(self, config: RunConfig) -> RunConfig:
        """The configuration with these methods."""
        adapters = {
            name: dataclasses.replace(adapter, method=self.methods[name])
            for name, adapter in config.adapters.items()
        }
        return dataclasses.replace(config, adapters=adapters)


def match_ranks(given: Mapping[str, Any], model: ModelConfig) -> MatchedRanks:
    """Chooses the ranks that are given as `match:NAME` or `parameters:N`.

    The number of parameters of a method is linear in its rank. The nearest rank is chosen, at least
    1, and the lower one of two that are equally near. Models are traced with shapes only.

    Args:
      given: methods of a run by adapter, see `RunConfig.methods`.
      model: architecture of the base.

    Raises:
      ConfigError: the number of parameters does not depend on the rank, or a method does not fit
        the model.
    """
    methods = dict(given)
    notes: dict[str, str] = {}
    for name in methods:
        _choose(name, methods, notes, model)
    return MatchedRanks(methods, notes)


def _choose(
    name: str, methods: dict[str, Any], notes: dict[str, str], model: ModelConfig
) -> AdapterMethod:
    """Replaces the method of adapter `name` in `methods` by one with a rank; returns it."""
    matched = methods[name]
    if not isinstance(matched, MatchedMethod):
        return matched
    wanted, of = matched.parameters, ""
    if matched.adapter is not None:  # `parse_run_config` has refused circles
        other = _choose(matched.adapter, methods, notes, model)
        wanted, of = _parameters(other, model, matched.adapter), f" of {matched.adapter!r}"
    assert wanted is not None
    one, two = (_parameters(matched.with_rank(rank), model, name) for rank in (1, 2))
    field = f"config.adapters.{name}.method.rank"
    if one == two:
        raise ConfigError(
            f"{field}: the number of parameters of the method {matched['name']!r} does not depend "
            "on its rank here; give a number"
        )
    rank = max(1, 1 + math.ceil((wanted - one) / (two - one) - 0.5))
    methods[name] = method = matched.with_rank(rank)
    found = _parameters(method, model, name)
    if found != one + (rank - 1) * (two - one):
        raise ConfigError(
            f"{field}: the number of parameters of the method {matched['name']!r} is not linear in "
            "its rank; give a number"
        )
    lowest = ", the lowest" if wanted < one else ""
    notes[name] = f"rank {rank}{lowest}: {found:,} parameters, nearest to the {wanted:,}{of}"
    return method


def _parameters(method: AdapterMethod, model: ModelConfig, adapter: str) -> int:
    """Number of trainable parameters of a method on a model."""
    with located(f"config.adapters.{adapter}.method"):
        method.check_model(model)
    return sum(math.prod(leaf.shape) for leaf in expected_leaves(model, method).values())
