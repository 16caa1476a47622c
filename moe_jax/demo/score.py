"""Scores of the demo's held-out questions: exact answers, losses, and loads of the experts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.method import AdapterMethod
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.run import RunConfig
from moe_jax.data.batch import Batch
from moe_jax.data.pipeline import load_validation_data
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.models.adapted import SINGLE, single_adapter
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


class AnswerScorer:
    """Scores answers with one model. It is compiled once for each batch shape."""

    def __init__(self, model: LlamaForCausalLM):
        """Takes a model whose `adapter_rows` match the adapters and batches to score."""

        @jax.jit
        def score_batch(params: Any, adapters: Any, batch: Batch) -> tuple[jax.Array, ...]:
            heads = lambda module, hidden, _: module.logits(hidden)
            logits, statistics = forward(model, params, adapters, batch, heads)
            mask = batch.loss_mask[:, 1:]
            is_question = jnp.any(mask, axis=-1)
            hits = jnp.argmax(logits[:, :-1], axis=-1) == batch.tokens[:, 1:]
            is_exact = is_question & jnp.all(hits | ~mask, axis=-1)
            losses, targets = row_losses(logits, batch)
            loads = [site.load_sum for sites in statistics.values() for site in sites.values()]
            return (
                jnp.sum(is_question),
                jnp.sum(is_exact),
                jnp.sum(losses),
                jnp.sum(targets),
                *loads,
            )

        self._score_batch = score_batch

    def __call__(
        self, params: Any, adapters: Mapping[str, Any], batches: Iterable[Batch]
    ) -> AnswerScore:
        """Scores the answers in `batches`, with one question per row; empty rows do not count.

        Greedy decoding gives an answer exactly if and only if each of its tokens is the most likely
        one after the question and the earlier tokens of the answer: one forward pass suffices.

        Args:
          params: frozen base parameters.
          adapters: adapter trees by name; empty for the base alone.
          batches: batches of NumPy arrays.
        """
        totals = None
        for batch in batches:
            sums = jax.device_get(self._score_batch(params, adapters, batch))
            totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
        if totals is None:
            raise ValueError("no batch to score")
        questions, exact, loss, targets, *loads = totals
        load = loads[0] / loads[0].sum(axis=-1, keepdims=True) if loads else None
        return AnswerScore(int(questions), float(exact / questions), float(loss / targets), load)


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
        self._frozen = LlamaForCausalLM(model_config, config.compute, param_dtype=dtype)
        self._scorers: dict[AdapterMethod | None, AnswerScorer] = {}

    def __call__(self, adapter: SavedAdapter | None) -> dict[str, AnswerScore]:
        """Scores by task; None scores the base alone."""
        method = None if adapter is None else adapter.method
        adapters = {} if adapter is None else {SINGLE: adapter.tree}
        scorer = self._scorer(method)
        return {
            task: scorer(self._params, adapters, batches) for task, batches in self._sets.items()
        }

    def _scorer(self, method: AdapterMethod | None) -> AnswerScorer:
        """Scorer of a method; the weights of an adapter are arguments of its compiled function."""
        if method not in self._scorers:
            model = self._frozen.clone(adapter_rows=single_adapter(method, self._rows))
            self._scorers[method] = AnswerScorer(model)
        return self._scorers[method]
