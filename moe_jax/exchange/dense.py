"""The llama format: an adapter merged into its base, as a checkpoint of the base's own family.

A LoRA, rsLoRA or DoRA is merged exactly. Experts behind a router have no such form: their matrices
are averaged, optionally weighted by their use on a text, and the divergence that this causes is
measured on that text. (The mean is taken over weights, not outputs. Gate and up projections enter
the FFN through a product, so the result is approximate even when all experts are used equally.)
"""

import functools
from typing import Any

import numpy as np

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.routing import SoftRouter, TopKRouter, TopPRouter
from moe_jax.adapters.routing.router import ROUTERS
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.parse import FieldError
from moe_jax.exchange.format import (
    FORMATS,
    ExportOptions,
    field_names,
    not_expressible,
    require_known,
)
from moe_jax.exchange.merged_weights import (
    LazyTensor,
    MergedWeights,
    base_tensors,
    ffn_projection,
    merged_tensor,
    stored_shape,
    stored_tensor,
)
from moe_jax.exchange.new_tokens import extended_model
from moe_jax.exchange.whole_model import ModelFormat, Plan
from moe_jax.hf.base_model import BaseModel
from moe_jax.hf.key_table import TensorParts
from moe_jax.loaded.adapter_measurement import AdapterMeasurement

_FORMAT = "llama"

# A score head is refused for every format without `classifies`.
_KNOWN_OF_LORA = (
    *field_names(LowRankConfig),
    *("target_modules", "classification", "new_tokens", "new_token_id"),
)
_KNOWN_OF_MIXLORA = (
    *_KNOWN_OF_LORA,
    *("num_experts", "router", "expert_lora", "ffn_dropout", "losses"),
)
# Routers under which the FFN's output is a mean of the experts' outputs, or nearly so.
_AVERAGING_ROUTERS = (TopKRouter, TopPRouter, SoftRouter)

_APPROXIMATIONS = {
    "average": "the experts of a layer are one FFN with the mean of their weights",
    "utilization": "the experts of a layer are one FFN with the mean of their weights, each "
    "weighted by its share of the tokens on which the divergence was measured",
}


@FORMATS.register(_FORMAT)
class DenseFormat(ModelFormat):
    """LoRA, rsLoRA and DoRA merged exactly, MixLoRA approximately, on bases of every family."""

    merges_experts = True

    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        method = adapter.method
        if isinstance(method, LoraConfig):
            require_known(method, _KNOWN_OF_LORA, "", _FORMAT)
            if options.weights is not None:
                raise FieldError("weights", "a LoRA has no experts to weight; leave it out")
            return
        if not isinstance(method, MixLoraConfig):
            name = METHODS.name_of(method)
            reason = "its experts are single projections with a router each, not FFNs"
            raise not_expressible(_FORMAT, f"method {name!r}", reason)
        require_known(method, _KNOWN_OF_MIXLORA, "", _FORMAT)
        if not isinstance(method.router, _AVERAGING_ROUTERS):
            name = ROUTERS.name_of(method.router)
            reason = "the FFN's output is not a mean of its experts' outputs"
            raise not_expressible(_FORMAT, f"router {name!r}", reason)
        if options.tokens is None:
            raise FieldError(
                "data",
                "merging experts is approximate, and the divergence has to be measured; give a "
                "text file",
            )

    def plan(
        self, adapter: SavedAdapter, base: BaseModel, config: dict[str, Any], options: ExportOptions
    ) -> Plan:
        method, tokens = adapter.method, options.tokens
        measuring = None if tokens is None else AdapterMeasurement(adapter, base, tokens)
        measure = None if measuring is None else measuring.divergence
        tensors = base_tensors(extended_model(base.config, method))
        if isinstance(method, LoraConfig):
            merged = [merged_tensor(name, parts) for name, parts in tensors]
            return Plan(config, merged, measure=measure)
        assert measuring is not None  # `check` refuses this
        weighting = options.weights or "average"
        if weighting == "average":
            shares = np.full(
                (base.config.num_layers, method.num_experts), 1.0 / method.num_experts, np.float32
            )
        else:
            shares = measuring.utilization()
        compute = functools.partial(_with_mean_experts, shares, method.expert_low_rank)
        merged = [
            LazyTensor(name, stored_shape(parts), functools.partial(compute, parts))
            for name, parts in tensors
        ]
        return Plan(config, merged, _APPROXIMATIONS[weighting], measure)


def _with_mean_experts(
    shares: np.ndarray, low_rank: LowRankConfig, parts: TensorParts, weights: MergedWeights
) -> np.ndarray:
    """A base's tensor; in FFN projections with the mean of the experts, `shares` being [L, E]."""

    def compute(path: str, layer: int) -> np.ndarray:
        projection = ffn_projection(path)
        if projection is None:
            return weights.merged(path, layer)
        return weights.mean_expert(projection, layer, shares[layer], low_rank)

    return stored_tensor(parts, compute)
