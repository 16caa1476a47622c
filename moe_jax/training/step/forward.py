"""The model applied to a batch, with the router statistics of its adapters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax.adapters.routing.statistics import RouterStatistics, collect_statistics
from moe_jax.data.batch import Batch
from moe_jax.layers.names import ROUTER
from moe_jax.models.adapted import apply
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.loss import head_outputs


def forward(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, Any],
    batch: Batch,
    heads: Callable[[LlamaForCausalLM, jax.Array, Batch], Any] = head_outputs,
    *,
    dropout_key: jax.Array | None = None,
    packed: bool = False,
) -> tuple[Any, dict[str, dict[str, RouterStatistics]]]:
    """Runs the model on a batch.

    Args:
      model: with the adapter rows of `batch`.
      params: the frozen base parameters.
      adapters: adapter trees by name.
      batch: [B, S]; rows of one sequence each, padded on the right (causality hides the padding).
      heads: maps the bound model, its hidden states and the batch to the result.
      dropout_key: random key of dropout and jitter; None turns both off.
      packed: rows may hold several sequences, which attention then separates by a mask.

    Returns:
      The result of `heads`, and the router statistics of the adapters that route, by name and site.
    """

    def compute(module: LlamaForCausalLM) -> Any:
        hidden = module.hidden_states(
            batch.tokens,
            positions=batch.positions,
            segment_ids=batch.segment_ids if packed else None,
            token_mask=batch.segment_ids != 0,
            expert_groups=batch.expert_groups,
        )
        return heads(module, hidden, batch)

    model = model.clone(deterministic=dropout_key is None)
    result, sown = apply(
        model, params, adapters, compute, mutable=[ROUTER], dropout_key=dropout_key
    )
    routed = any(rows.method.routes for rows in model.adapter_rows)
    return result, collect_statistics(sown) if routed else {}
