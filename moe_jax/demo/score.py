"""How well questions are answered, and which experts answer them."""

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


class Scorer:
    """Scores answers with one model, compiled once for each shape of batch."""

    def __init__(self, model: LlamaForCausalLM):
        """Takes a model whose adapter_rows fit the adapters and the rows of the batches to come."""

        @jax.jit
        def judge(params: Any, adapters: Any, batch: Batch) -> tuple[jax.Array, ...]:
            heads = lambda module, hidden, _: module.logits(hidden)
            logits, statistics = forward(model, params, adapters, batch, heads)
            mask = batch.loss_mask[:, 1:]
            asked = jnp.any(mask, axis=-1)
            hits = jnp.argmax(logits[:, :-1], axis=-1) == batch.tokens[:, 1:]
            right = asked & jnp.all(hits | ~mask, axis=-1)
            losses, targets = row_losses(logits, batch)
            loads = [site.load_sum for sites in statistics.values() for site in sites.values()]
            return jnp.sum(asked), jnp.sum(right), jnp.sum(losses), jnp.sum(targets), *loads

        self._judge = judge

    def __call__(self, params: Any, adapters: Mapping[str, Any], batches: Iterable[Batch]) -> Score:
        """Scores the answers in `batches`, rows of one question each; empty rows do not count.

        Greedy decoding writes an answer exactly if and only if each of its tokens is the likeliest
        one after the question and the answer's own earlier tokens, so one forward pass decides it.

        Args:
          params: the frozen base parameters.
          adapters: `{name: tree}`; empty scores the base.
          batches: NumPy arrays.
        """
        totals = None
        for batch in batches:
            parts = jax.device_get(self._judge(params, adapters, batch))
            totals = (
                parts if totals is None else [a + b for a, b in zip(totals, parts, strict=True)]
            )
        if totals is None:
            raise ValueError("no batch to score")
        asked, right, loss, targets, *loads = totals
        load = loads[0] / loads[0].sum(axis=-1, keepdims=True) if loads else None
        return Score(int(asked), float(right / asked), float(loss / targets), load)


class Examiner:
    """Asks the held-out questions of a run, of its frozen base and of adapters on it."""

    def __init__(self, config: RunConfig, adapter: str):
        """Loads the base of `config`, and the questions that validate its adapter `adapter`."""
        base, own = Path(config.base.path), config.adapters[adapter]
        model_config = read_model_config(base)
        self._params = load_base_params(base, model_config, config.base.param_dtype)
        self._rows = own.batch_size
        self._sets = load_validation_data(own.data, load_tokenizer(base), self._rows)
        dtype = config.base.param_dtype
        self._frozen = LlamaForCausalLM(model_config, config.compute, param_dtype=dtype)
        self._scorers: dict[AdapterMethod | None, Scorer] = {}

    def __call__(self, adapter: SavedAdapter | None) -> dict[str, Score]:
        """The scores by task; None asks the frozen base."""
        method = None if adapter is None else adapter.method
        adapters = {} if adapter is None else {SINGLE: adapter.tree}
        scorer = self._scorer(method)
        return {
            task: scorer(self._params, adapters, batches) for task, batches in self._sets.items()
        }

    def _scorer(self, method: AdapterMethod | None) -> Scorer:
        """One for all adapters of an equal method: their weights are arguments."""
        if method not in self._scorers:
            model = self._frozen.clone(adapter_rows=single_adapter(method, self._rows))
            self._scorers[method] = Scorer(model)
        return self._scorers[method]
