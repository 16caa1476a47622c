"""What changing an adapter needs to know of some text: how often each expert is used, and how far
what is computed afterwards is from what was computed before.
"""

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
from moe_jax.models.adapted import SINGLE, apply, single_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM


class LogitChange(NamedTuple):
    """How far the logits of one model are from those of another, on the same tokens.

    Attributes:
      divergence: KL of the next-token distributions, `sum_v p(v) (log p(v) - log q(v))` with p the
        exact model's and q the other's, the mean over tokens, in nats.
      largest: the largest difference of two logits.
      mean_square: of the logits' differences, the mean.
    """

    divergence: float
    largest: float
    mean_square: float


class AdapterMeasurement:
    """The exact model, an adapter on its base, in memory; it computes in float32.

    Rows go through it one at a time, so that beside the parameters memory holds the logits of one.
    """

    def __init__(self, adapter: SavedAdapter, base: BaseModel, tokens: np.ndarray):
        """Loads the base.

        Args:
          adapter: of that base.
          base: from `open_adapter_base`.
          tokens: int [N, S], rows of real tokens.
        """
        self._compute = ComputeConfig(dtype="float32")
        self._model = LlamaForCausalLM(
            base.config, self._compute, adapter_rows=single_adapter(adapter.method, 1)
        )
        params = load_base_params(base.folder, base.config, "float32")
        self._params, self._adapters = params, {SINGLE: adapter.tree}
        self._rows = [jnp.asarray(row[None]) for row in tokens]

    def loads(self) -> dict[str, np.ndarray]:
        """What each expert had to carry, summed over the tokens, [L, E] of each routed site.

        A site is called as in `collect_statistics`. Layers that do not route have zeros.
        """

        @jax.jit
        def load(params: Any, adapters: Any, row: jax.Array) -> dict[str, jax.Array]:
            compute = LlamaForCausalLM.hidden_states
            _, sown = apply(self._model, params, adapters, compute, row, mutable=[ROUTER])
            sites = collect_statistics(sown)[SINGLE]
            return {site: statistics.load_sum for site, statistics in sites.items()}

        rows = [load(self._params, self._adapters, row) for row in self._rows]
        return {site: np.sum([np.asarray(row[site]) for row in rows], axis=0) for site in rows[0]}

    def utilisation(self) -> np.ndarray:
        """The share of each expert in its layer's load, [L, E], float32; rows sum to one."""
        total = self.loads()[f"mlp/{MOE}"]
        return (total / total.sum(axis=-1, keepdims=True)).astype(np.float32)

    def divergence(self, folder: Path) -> float:
        """KL of the next-token distributions from those of the model in `folder`, nats per token.

        See `LogitChange.divergence`; this adapter on its base is the exact model.
        """
        return self._change(self._whole_model(folder), exact_first=True).divergence

    def change_to(self, adapter: SavedAdapter) -> LogitChange:
        """How far another adapter on the same base is from this one, which is the exact model."""
        model = self._model.clone(adapter_rows=single_adapter(adapter.method, 1))
        return self._change((model, self._params, {SINGLE: adapter.tree}), exact_first=True)

    def change_from(self, folder: Path) -> LogitChange:
        """How far this adapter on its base is from the model in `folder`, the exact one."""
        return self._change(self._whole_model(folder), exact_first=False)

    def _whole_model(self, folder: Path) -> tuple[LlamaForCausalLM, Any, Any]:
        model = read_model_config(folder)
        params = load_base_params(folder, model, "float32")
        return LlamaForCausalLM(model, self._compute), params, {}

    def _change(
        self, other: tuple[LlamaForCausalLM, Any, Any], *, exact_first: bool
    ) -> LogitChange:
        """Between this adapter on its base and another model, either of which is the exact one."""

        @jax.jit
        def change(arrays: Any, other_arrays: Any, row: jax.Array) -> tuple[jax.Array, ...]:
            compute = LlamaForCausalLM.__call__
            logits: list[Any] = [
                apply(self._model, *arrays, compute, row),
                apply(other[0], *other_arrays, compute, row),
            ]
            exact, changed = logits if exact_first else logits[::-1]
            p, q = (jax.nn.log_softmax(each, axis=-1) for each in (exact, changed))
            difference = jnp.abs(exact - changed)
            divergence = jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))
            return divergence, jnp.max(difference), jnp.mean(jnp.square(difference))

        arrays = self._params, self._adapters
        rows = [change(arrays, other[1:], row) for row in self._rows]
        divergence, largest, square = (np.asarray(each) for each in zip(*rows, strict=True))
        return LogitChange(float(divergence.mean()), float(largest.max()), float(square.mean()))
