"""A base and its adapter as one model of the base's own family, with its key table.

A LoRA, also as rsLoRA or DoRA, becomes part of the weights and nothing is lost. Experts behind a
router have no such form: their matrices are averaged, or weighted by how much each is used on some
text, and what that costs on that text is measured. (The mean is over weights, not outputs: gate and
up enter the FFN through a product, so that even experts of equal use are not their mean.)
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
    NotExpressible,
    cannot,
    field_names,
    require_known,
)
from moe_jax.exchange.whole_model import (
    Merger,
    ModelFormat,
    Plan,
    Recipe,
    as_stored,
    base_tensors,
    expert_target,
    stored_shape,
)
from moe_jax.hf.key_table import TensorParts
from moe_jax.loaded.base_folder import BaseFolder
from moe_jax.loaded.comparison import Measuring

_FORMAT = "llama"

# A score head is refused for every format that does not say that it classifies.
_KNOWN_OF_LORA = (*field_names(LowRankConfig), "target_modules", "classification")
_KNOWN_OF_MIXLORA = (
    *_KNOWN_OF_LORA,
    "num_experts",
    "router",
    "expert_lora",
    "ffn_dropout",
    "losses",
)
# Those under which an FFN's output is a mean of experts' outputs, or nearly so.
_MEANS = (TopKRouter, TopPRouter, SoftRouter)

_WEIGHTINGS = {
    "average": "the experts of a layer are one FFN with the mean of their weights",
    "utilisation": "the experts of a layer are one FFN with the mean of their weights, each "
    "weighted by its share of the tokens that the divergence was measured on",
}


@FORMATS.register(_FORMAT)
class DenseFormat(ModelFormat):
    """LoRA, rsLoRA and DoRA merged exactly, MixLoRA approximately, on bases of every family."""

    measures = True

    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        method = adapter.method
        if isinstance(method, LoraConfig):
            require_known(method, _KNOWN_OF_LORA, "", _FORMAT)
            if options.weights is not None:
                raise FieldError("weights", "a LoRA has no experts to be weighted; leave it out")
            return
        if not isinstance(method, MixLoraConfig):
            name = METHODS.name_of(method)
            reason = "each projection has a router of its own there"
            raise cannot(_FORMAT, f"method {name!r}", reason)
        require_known(method, _KNOWN_OF_MIXLORA, "", _FORMAT)
        if not isinstance(method.router, _MEANS):
            name = ROUTERS.name_of(method.router)
            raise cannot(_FORMAT, f"router {name!r}", "its output is no mean of its experts'")
        if options.tokens is None:
            raise NotExpressible(
                "data: experts can be merged approximately only, and what that costs has to be "
                "measured; give a file of text with --data"
            )

    def plan(
        self,
        adapter: SavedAdapter,
        base: BaseFolder,
        config: dict[str, Any],
        options: ExportOptions,
    ) -> Plan:
        method, tokens = adapter.method, options.tokens
        measuring = None if tokens is None else Measuring(adapter, base, tokens)
        measure = None if measuring is None else measuring.divergence
        tensors = base_tensors(base.model)
        if isinstance(method, LoraConfig):
            recipes = [
                Recipe(key, stored_shape(parts), functools.partial(_merged, parts))
                for key, parts in tensors
            ]
            return Plan(config, recipes, measure=measure)
        assert measuring is not None  # or `check` would have refused
        weighting = options.weights or "average"
        if weighting == "average":
            shares = np.full(
                (base.model.num_layers, method.num_experts), 1.0 / method.num_experts, np.float32
            )
        else:
            shares = measuring.utilisation()
        mean = functools.partial(_mean, shares, method.expert_low_rank)
        recipes = [
            Recipe(key, stored_shape(parts), functools.partial(mean, parts))
            for key, parts in tensors
        ]
        return Plan(config, recipes, _WEIGHTINGS[weighting], measure)


def _merged(parts: TensorParts, merger: Merger) -> np.ndarray:
    return as_stored(parts, merger.merged)


def _mean(
    shares: np.ndarray, low_rank: LowRankConfig, parts: TensorParts, merger: Merger
) -> np.ndarray:
    def make(path: str, layer: int) -> np.ndarray:
        target = expert_target(path)
        if target is None:
            return merger.merged(path, layer)
        return merger.mean_expert(target, layer, shares[layer], low_rank)

    return as_stored(parts, make)
