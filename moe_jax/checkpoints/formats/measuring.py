"""What merging experts needs to know of some text: how often each is used, and what it costs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.segments import Segment
from moe_jax.adapters.sites import MOE, to_collection
from moe_jax.adapters.statistics import collect_statistics
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.base import load_base
from moe_jax.checkpoints.formats.merging import BaseFolder
from moe_jax.checkpoints.hf_config import read_model_config
from moe_jax.config.model import ComputeConfig
from moe_jax.layers.collections import ADAPTERS, PARAMS, ROUTER
from moe_jax.models.causal_lm import LlamaForCausalLM

_NAME = "exported"


class Measuring:
    """The exact model, an adapter on its base, in memory; it computes in float32.

    Rows go through it one at a time, so that beside the parameters memory holds the logits of one.
    """

    def __init__(self, adapter: SavedAdapter, base: BaseFolder, tokens: np.ndarray):
        """Loads the base.

        Args:
          adapter: of that base.
          base: from `find_base`.
          tokens: int [N, S], rows of real tokens.
        """
        self._compute = ComputeConfig(dtype="float32")
        self._model = LlamaForCausalLM(
            base.model, self._compute, segments=(Segment(_NAME, adapter.method, 0, 1),)
        )
        params = load_base(base.folder, base.model, "float32")
        self._variables = {PARAMS: params, ADAPTERS: to_collection({_NAME: adapter.tree})}
        self._rows = [jnp.asarray(row[None]) for row in tokens]

    def utilisation(self) -> np.ndarray:
        """The share of each expert in its layer's load, [L, E], float32; rows sum to one."""

        @jax.jit
        def load(variables: Any, row: jax.Array) -> jax.Array:
            _, sown = self._model.apply(variables, row, mutable=[ROUTER])
            return collect_statistics(sown)[_NAME][f"mlp/{MOE}"].load_sum

        total = np.sum([np.asarray(load(self._variables, row)) for row in self._rows], axis=0)
        return (total / total.sum(axis=-1, keepdims=True)).astype(np.float32)

    def divergence(self, folder: Path) -> float:
        """KL of the next-token distributions from those of the model in `folder`, nats per token.

        That is the mean of `sum_v p(v) (log p(v) - log q(v))`, p exact and q the other's.
        """
        model = read_model_config(folder)
        other, params = LlamaForCausalLM(model, self._compute), load_base(folder, model, "float32")

        @jax.jit
        def divergence(variables: Any, params: Any, row: jax.Array) -> jax.Array:
            logits: tuple[Any, Any] = (
                self._model.apply(variables, row),
                other.apply({PARAMS: params}, row),
            )
            exact, merged = (jax.nn.log_softmax(each, axis=-1) for each in logits)
            return jnp.mean(jnp.sum(jnp.exp(exact) * (exact - merged), axis=-1))

        return float(
            np.mean([np.asarray(divergence(self._variables, params, row)) for row in self._rows])
        )
