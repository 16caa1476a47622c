"""The evaluation step as it is compiled: once for all adapters that are of the same kind."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import Segment
from moe_jax.data.batch import Batch
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.rules import RULES
from moe_jax.training.step import step

Evaluate = Callable[[str | None, Mapping[str, Any], Any, Batch], tuple[jax.Array, jax.Array]]
"""See `Program.eval_step`."""


def with_rules(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced under the rules that map logical axes to the mesh."""

    def wrapped(*args: Any) -> Any:
        with nn.logical_axis_rules(RULES):
            return function(*args)

    return wrapped


def twins(methods: Mapping[str, AdapterMethod]) -> dict[str, str]:
    """For each adapter the first one of an equal method, which may be itself.

    What is traced for that one does for both: an adapter's name changes no number.
    """
    return {
        name: next(other for other, method in methods.items() if method == own)
        for name, own in methods.items()
    }


def make_evaluate(
    model: LlamaForCausalLM,
    methods: Mapping[str, AdapterMethod],
    mesh: Mesh,
    *,
    by_row: bool = False,
) -> Evaluate:
    """The jitted evaluation step, for rows of the adapter named by its first argument.

    Args:
      model: the language model, without segments.
      methods: by adapter.
      mesh: where it runs.
      by_row: `step.score_step`, of classification adapters, instead of `step.eval_step`.
    """

    def function(name: str | None, adapters: Any, params: Any, batch: Batch) -> Any:
        segments = ()
        if name is not None:
            segments = (Segment(name, methods[name], 0, batch.tokens.shape[0]),)
        compute = step.score_step if by_row else step.eval_step
        return compute(model.clone(segments=segments), adapters, params, batch)

    replicated = NamedSharding(mesh, PartitionSpec())
    jitted = jax.jit(with_rules(function), static_argnums=0, out_shardings=replicated)
    twin_of = twins(methods)

    def evaluate(name: str | None, adapters: Mapping[str, Any], params: Any, batch: Batch) -> Any:
        if name is None:
            return jitted(None, {}, params, batch)
        return jitted(twin_of[name], {twin_of[name]: adapters[name]}, params, batch)

    return evaluate
