"""How well questions are answered, and which experts answer them."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.data.batch import Batch
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.loss import row_losses
from moe_jax.training.step import forward


class Score(NamedTuple):
    """Of one set of questions.

    Attributes:
      questions: how many.
      exact: share of them that greedy decoding answers exactly, the end of text included.
      loss: nats per token of the right answers.
      load: float [L, E], share of the slots of layer L that went to expert E; None without routers.
    """

    questions: int
    exact: float
    loss: float
    load: np.ndarray | None


def score(
    model: LlamaForCausalLM, params: Any, adapters: Mapping[str, Any], batches: Iterable[Batch]
) -> Score:
    """Scores the answers in `batches`, rows of one question each; empty rows do not count.

    Greedy decoding writes an answer exactly if and only if each of its tokens is the likeliest one
    after the question and the answer's own earlier tokens, so one forward pass decides it.

    Args:
      model: its segments fit `adapters` and the rows of the batches.
      params: the frozen base parameters.
      adapters: `{name: tree}`; empty scores the base.
      batches: NumPy arrays.
    """

    @jax.jit
    def judge(params: Any, adapters: Any, batch: Batch) -> tuple[jax.Array, ...]:
        logits, statistics = forward(model, params, adapters, batch, dropout_key=None)
        mask = batch.loss_mask[:, 1:]
        asked = jnp.any(mask, axis=-1)
        hits = jnp.argmax(logits[:, :-1], axis=-1) == batch.tokens[:, 1:]
        right = asked & jnp.all(hits | ~mask, axis=-1)
        losses, targets = row_losses(logits, batch)
        loads = [site.load_sum for sites in statistics.values() for site in sites.values()]
        return jnp.sum(asked), jnp.sum(right), jnp.sum(losses), jnp.sum(targets), *loads

    totals = None
    for batch in batches:
        parts = jax.device_get(judge(params, adapters, batch))
        totals = parts if totals is None else [a + b for a, b in zip(totals, parts, strict=True)]
    if totals is None:
        raise ValueError("no batch to score")
    asked, right, loss, targets, *loads = totals
    load = loads[0] / loads[0].sum(axis=-1, keepdims=True) if loads else None
    return Score(int(asked), float(right / asked), float(loss / targets), load)
