"""Scores of the demo's held-out questions: exact answers, losses, and loads of the experts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.rows import AdapterRows
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.run import RunConfig
from moe_jax.data.batch import Batch
from moe_jax.data.pipeline import load_validation_data
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.models.adapted import SINGLE, CompiledLlama, single_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.loss import row_losses
from moe_jax.training.step.step import forward


class AnswerScore(NamedTuple):
    """Scores of one set of questions.

    Attributes:
      questions: number of questions.
      exact: share that greedy decoding answers exactly, including the end-of-text token.
      loss: mean loss of the right answers in nats per token.
      load: float [L, E], share of the load of layer L on expert E; None without routers.
    """

    questions: int
    exact: float
    loss: float
    load: np.ndarray | None


def score_answers(
    llama: CompiledLlama,
    adapter_rows: tuple[AdapterRows, ...],
    params: Any,
    adapters: Mapping[str, Any],
    batches: Iterable[Batch],
) -> AnswerScore:
    """Scores the answers in `batches`, with one question per row; empty rows do not count.

    Greedy decoding gives an answer exactly if and only if each of its tokens is the most likely one
    after the question and the earlier tokens of the answer: one forward pass suffices.

    Args:
      llama: model; it is compiled once for each method and batch shape.
      adapter_rows: adapter rows of a batch; empty for the base alone.
      params: frozen base parameters.
      adapters: adapter trees by name; empty for the base alone.
      batches: batches of NumPy arrays.
    """
    score_batch = llama.jit(_score_batch, llama.with_rows(adapter_rows))
    totals = None
    for batch in batches:
        sums = jax.device_get(score_batch(params, adapters, batch))
        totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
    if totals is None:
        raise ValueError("no batch to score")
    questions, exact, loss, targets, *loads = totals
    load = loads[0] / loads[0].sum(axis=-1, keepdims=True) if loads else None
    return AnswerScore(int(questions), float(exact / questions), float(loss / targets), load)


def _score_batch(
    model: LlamaForCausalLM, params: Any, adapters: Any, batch: Batch
) -> tuple[jax.Array, ...]:
    """Numbers of questions and exact answers, summed loss, number of targets, and loads."""
    heads = lambda module, hidden, _: module.logits(hidden)
    logits, statistics = forward(model, params, adapters, batch, heads)
    mask = batch.loss_mask[:, 1:]
    is_question = jnp.any(mask, axis=-1)
    hits = jnp.argmax(logits[:, :-1], axis=-1) == batch.tokens[:, 1:]
    is_exact = is_question & jnp.all(hits | ~mask, axis=-1)
    losses, targets = row_losses(logits, batch)
    loads = [site.load_sum for sites in statistics.values() for site in sites.values()]
    return jnp.sum(is_question), jnp.sum(is_exact), jnp.sum(losses), jnp.sum(targets), *loads


class HeldOutScorer:
    """Scores the base of a run and adapters of it on held-out questions."""

    def __init__(self, config: RunConfig, adapter: str):
        """Loads the base of `config` and the validation data of its adapter `adapter`."""
        base, adapter_config = Path(config.base.path), config.adapters[adapter]
        model_config = read_model_config(base)
        self._params = load_base_params(base, model_config, config.base.param_dtype)
        self._rows = adapter_config.batch_size
        self._sets = load_validation_data(adapter_config.data, load_tokenizer(base), self._rows)
        dtype = config.base.param_dtype
        self._llama = CompiledLlama(
            LlamaForCausalLM(model_config, config.compute, param_dtype=dtype)
        )

    def __call__(self, adapter: SavedAdapter | None) -> dict[str, AnswerScore]:
        """Scores by task; None scores the base alone."""
        rows = single_adapter(None if adapter is None else adapter.method, self._rows)
        adapters = {} if adapter is None else {SINGLE: adapter.tree}
        return {
            task: score_answers(self._llama, rows, self._params, adapters, batches)
            for task, batches in self._sets.items()
        }
