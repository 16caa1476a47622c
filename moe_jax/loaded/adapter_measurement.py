"""Measurements of an adapter on text: expert loads, and the change of logits from another model."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.routing.statistics import collect_statistics
from moe_jax.adapters.tree import MOE
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ComputeConfig
from moe_jax.hf.base_model import BaseModel
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.layers.names import ROUTER
from moe_jax.models.adapted import SINGLE, CompiledLlama, apply, single_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM


class LogitChange(NamedTuple):
    """Difference of the logits of two models on the same tokens.

    Attributes:
      divergence: KL divergence of the next-token distributions in nats, the mean over tokens of
        `sum_v p(v) (log p(v) - log q(v))`, with p of the reference model and q of the other.
      largest: largest absolute difference of two logits.
      mean_square: mean squared difference of the logits.
    """

    divergence: float
    largest: float
    mean_square: float


class AdapterMeasurement:
    """An adapter on its base, measured on rows of tokens in float32.

    It computes one row at a time, to hold the logits of one row only beside the parameters.
    """

    def __init__(self, adapter: SavedAdapter, base: BaseModel, tokens: np.ndarray):
        """Loads the parameters of the base.

        Args:
          adapter: adapter to measure.
          base: base model of the adapter, from `open_adapter_base`.
          tokens: int [B, S], rows without padding.
        """
        self._compute = ComputeConfig(dtype="float32")
        self._llama = CompiledLlama(LlamaForCausalLM(base.config, self._compute))
        self._model = self._llama.with_rows(single_adapter(adapter.method, 1))
        params = load_base_params(base.folder, base.config, "float32")
        self._params, self._adapters = params, {SINGLE: adapter.tree}
        self._rows = [jnp.asarray(row[None]) for row in tokens]

    def loads(self) -> dict[str, np.ndarray]:
        """Load of each expert, summed over the tokens, [L, E] for each routed site.

        Sites are named as in `collect_statistics`. Layers without a router have zeros.
        """
        load = self._llama.jit(_load, self._model)
        rows = [load(self._params, self._adapters, row) for row in self._rows]
        return {site: np.sum([np.asarray(row[site]) for row in rows], axis=0) for site in rows[0]}

    def utilization(self) -> np.ndarray:
        """Share of each expert in the load of its layer, float32 [L, E]; rows sum to one."""
        total = self.loads()[f"mlp/{MOE}"]
        return (total / total.sum(axis=-1, keepdims=True)).astype(np.float32)

    def divergence(self, folder: Path) -> float:
        """KL divergence to the model in `folder`, in nats per token; see `LogitChange.divergence`.

        This adapter on its base is the reference.
        """
        return self._change(self._whole_model(folder), is_reference=True).divergence

    def logit_change_to(self, adapter: SavedAdapter) -> LogitChange:
        """Change to another adapter on the same base; this adapter is the reference."""
        model = self._llama.with_rows(single_adapter(adapter.method, 1))
        return self._change((model, self._params, {SINGLE: adapter.tree}), is_reference=True)

    def logit_change_from(self, folder: Path) -> LogitChange:
        """Change from the model in `folder`, the reference, to this adapter on its base."""
        return self._change(self._whole_model(folder), is_reference=False)

    def _whole_model(self, folder: Path) -> tuple[LlamaForCausalLM, Any, Any]:
        model = read_model_config(folder)
        params = load_base_params(folder, model, "float32")
        return LlamaForCausalLM(model, self._compute), params, {}

    def _change(
        self, other: tuple[LlamaForCausalLM, Any, Any], *, is_reference: bool
    ) -> LogitChange:
        """Change between this adapter and another model; `is_reference` refers to this adapter."""
        this = self._model, self._params, self._adapters
        reference, changed = (this, other) if is_reference else (other, this)
        change = self._llama.jit(_logit_change, reference[0], changed[0])
        rows = [change(reference[1:], changed[1:], row) for row in self._rows]
        divergence, largest, square = map(np.asarray, zip(*rows, strict=True))
        return LogitChange(float(divergence.mean()), float(largest.max()), float(square.mean()))


def _load(
    model: LlamaForCausalLM, params: Any, adapters: Any, row: jax.Array
) -> dict[str, jax.Array]:
    """Load of each expert on a row [1, S], [L, E] for each routed site."""
    compute = LlamaForCausalLM.hidden_states
    _, sown = apply(model, params, adapters, compute, row, mutable=[ROUTER])
    sites = collect_statistics(sown)[SINGLE]
    return {site: statistics.load_sum for site, statistics in sites.items()}


def _logit_change(
    reference: LlamaForCausalLM,
    changed: LlamaForCausalLM,
    reference_arrays: tuple[Any, Any],
    changed_arrays: tuple[Any, Any],
    row: jax.Array,
) -> tuple[jax.Array, ...]:
    """Fields of `LogitChange` for a row [1, S]; arrays are base parameters and adapters."""
    compute = LlamaForCausalLM.__call__
    expected: Any = apply(reference, *reference_arrays, compute, row)
    actual: Any = apply(changed, *changed_arrays, compute, row)
    p, q = (jax.nn.log_softmax(logits, axis=-1) for logits in (expected, actual))
    difference = jnp.abs(expected - actual)
    divergence = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
    return divergence, jnp.max(difference), jnp.mean(jnp.square(difference))
