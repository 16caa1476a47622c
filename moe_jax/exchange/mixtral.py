"""Mixtral and Qwen3-MoE: a MixLoRA adapter and its base as one mixture-of-experts model.

With a top-k router a MixLoRA is such a model as it stands: softmax over all experts, the k most
probable, their probabilities renormalised; each expert a gated FFN of its own, here the frozen one
with the expert's pairs in it. What serves Mixtral therefore serves a MixLoRA.

Checked with transformers 5.23, whose classes read the names below and join the experts on loading.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import METHODS
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.routing.router import ROUTERS
from moe_jax.adapters.routing.strategies import TopKRouter
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ModelConfig, RopeConfig
from moe_jax.exchange.format import (
    FORMATS,
    ExportOptions,
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
from moe_jax.loaded.base_folder import BaseFolder

_FORMAT = "mixtral"

# All that a method may say: what is written, and what matters for training only.
_KNOWN = (
    *field_names(LowRankConfig),
    "target_modules",
    "classification",  # refused for every format that does not say that it classifies
    "num_experts",
    "router",
    "expert_lora",
    "ffn_dropout",
    "losses",
)
_KNOWN_OF_ROUTER = ("top_k", "init_std", "jitter_noise")


class _Names(NamedTuple):
    """What a model type calls its experts.

    Attributes:
      block: where they are in a layer.
      experts: tensors of one expert, by our projections.
    """

    block: str
    experts: dict[str, str]


_MIXTRAL = _Names("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
_QWEN3_MOE = _Names("mlp", {name: name for name in _MIXTRAL.experts})

_NAMES = {"llama": _MIXTRAL, "mistral": _MIXTRAL, "qwen3": _QWEN3_MOE}
"""By the base's model type."""

# Fields of the base's own that mean the same there; without them, defaults might differ.
_KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "use_cache",
)


@FORMATS.register(_FORMAT)
class MixtralFormat(ModelFormat):
    """MixLoRA with a top-k router, on Llama and Mistral as Mixtral and on Qwen3 as Qwen3-MoE."""

    def check(self, adapter: SavedAdapter, options: ExportOptions) -> None:
        method = adapter.method
        if not isinstance(method, MixLoraConfig):
            name = METHODS.name_of(method)
            raise cannot(
                _FORMAT,
                f"method {name!r}",
                "its experts are whole FFNs behind one router, as MixLoRA has them",
            )
        require_known(method, _KNOWN, "", _FORMAT)
        if not isinstance(method.router, TopKRouter):
            raise cannot(
                _FORMAT,
                f"router {ROUTERS.name_of(method.router)!r}",
                "it has top_k alone",
            )
        require_known(method.router, _KNOWN_OF_ROUTER, "router.", _FORMAT)
        _check_model(adapter.model)

    def plan(
        self,
        adapter: SavedAdapter,
        base: BaseFolder,
        config: dict[str, Any],
        options: ExportOptions,
    ) -> Plan:
        _check_model(base.model)
        method, model = adapter.method, base.model
        kept = {name: config[name] for name in _KEPT if name in config}
        return Plan(kept | _config(model, method), _recipes(model, method))


def _check_model(model: ModelConfig) -> None:
    """Refuses bases that no mixture-of-experts architecture is equal to."""
    kind = model.model_type
    if kind not in _NAMES:
        raise cannot(
            _FORMAT,
            f"a base of type {kind!r}",
            f"only {', '.join(_NAMES)} have a mixture of experts that is equal but for its FFN",
        )
    if model.mlp_bias:
        raise cannot(_FORMAT, "a base with mlp_bias", "its experts have no biases")
    if model.attention_bias and kind != "qwen3":
        raise cannot(_FORMAT, "a base with attention_bias", "Mixtral has no biases")
    if len(set(model.sliding_layers)) > 1:
        raise cannot(_FORMAT, "layer_types that differ", "its layers are all alike")


def _config(model: ModelConfig, method: MixLoraConfig) -> dict[str, Any]:
    router = method.router
    assert isinstance(router, TopKRouter)
    fields = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": model.hidden_act,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "sliding_window": model.sliding_window,
        "num_experts_per_tok": router.top_k,
        "output_router_logits": False,
        **_rope(model.rope),
    }
    if model.model_type != "qwen3":
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            **fields,
            "num_local_experts": method.num_experts,
        }
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **fields,
        "attention_bias": model.attention_bias,
        "use_sliding_window": model.sliding_window is not None,
        "max_window_layers": 0,  # where layers begin to slide, for transformers before version 5
        "moe_intermediate_size": model.intermediate_size,
        "num_experts": method.num_experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _rope(rope: RopeConfig) -> dict[str, Any]:
    """Rotary embeddings as transformers 5 reads them, and as versions before it do."""
    fields = {name: getattr(rope, name) for name in field_names(RopeConfig)}
    # What the bases of this format cannot choose, and a detail of YaRN.
    for name in ("partial_rotary_factor", "interleaved"):
        fields.pop(name)
    if rope.rope_type != "yarn":
        fields.pop("truncate")
    stated = {name: value for name, value in fields.items() if value is not None}
    older = {name: value for name, value in stated.items() if name != "rope_theta"}
    return {
        "rope_parameters": stated,
        "rope_theta": rope.rope_theta,
        "rope_scaling": None if rope.rope_type == "default" else older,
    }


def _recipes(model: ModelConfig, method: MixLoraConfig) -> list[Recipe]:
    names, experts = _NAMES[model.model_type], range(method.num_experts)
    recipes = []
    for key, parts in base_tensors(model):
        leaf, layer = parts[0]
        target, shape = expert_target("/".join(leaf.path)), stored_shape(parts)
        block = f"model.layers.{layer}.{names.block}"
        if target is None:
            recipes.append(Recipe(key, shape, functools.partial(_merged, parts)))
            continue
        if target == "gate_proj":  # once a layer
            shape_of_router = (method.num_experts, model.hidden_size)
            make = functools.partial(_router, layer)
            recipes.append(Recipe(f"{block}.gate.weight", shape_of_router, make))
        for expert in experts:
            make = functools.partial(_expert, target, layer, expert, method.expert_low_rank)
            name = f"{block}.experts.{expert}.{names.experts[target]}.weight"
            recipes.append(Recipe(name, shape, make))
    return recipes


def _merged(parts: Any, merger: Merger) -> np.ndarray:
    return as_stored(parts, merger.merged)


def _router(layer: int, merger: Merger) -> np.ndarray:
    return merger.router(layer).T


def _expert(
    target: str, layer: int, expert: int, low_rank: LowRankConfig, merger: Merger
) -> np.ndarray:
    return merger.expert(target, layer, expert, low_rank).T
