"""The mixtral format: a MixLoRA and its base as one Mixtral or Qwen3-MoE checkpoint.

A MixLoRA with a top-k router is such a model: softmax over all experts, the k most probable, their
probabilities renormalized. Each expert is a gated FFN, here the frozen FFN with the expert's pairs
merged into it. Software that serves Mixtral therefore serves a MixLoRA.

Tested with transformers 5.23, whose classes read the tensor names below and stack the experts.
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
from moe_jax.config.model import ModelConfig
from moe_jax.config.rope import RopeConfig
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
)
from moe_jax.exchange.new_tokens import extended_model
from moe_jax.exchange.whole_model import ModelFormat, Plan
from moe_jax.hf.base_model import BaseModel

_FORMAT = "mixtral"

# Fields that are written, checked, or relevant for training only.
_KNOWN = (
    *field_names(LowRankConfig),
    "target_modules",
    "classification",  # refused for every format without `classifies`
    "num_experts",
    "router",
    "expert_lora",
    "ffn_dropout",
    "losses",
    "new_tokens",
    "new_token_id",
)
_HANDLED_ROUTER_FIELDS = ("top_k", "init_std", "jitter_noise")


class _ExpertNames(NamedTuple):
    """Tensor names of the experts of a model type.

    Attributes:
      block: name of the module in a layer.
      experts: tensor names of one expert, by projection.
    """

    block: str
    experts: dict[str, str]


_MIXTRAL = _ExpertNames("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})
_QWEN3_MOE = _ExpertNames("mlp", {name: name for name in _MIXTRAL.experts})

_EXPERT_NAMES = {"llama": _MIXTRAL, "mistral": _MIXTRAL, "qwen3": _QWEN3_MOE}
"""Names by the model type of the base."""

# Fields of the base's config.json that are copied, since defaults of the two types may differ.
_COPIED_FIELDS = (
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
            reason = "its experts are FFNs behind one router, as in MixLoRA"
            raise not_expressible(_FORMAT, f"method {name!r}", reason)
        require_known(method, _KNOWN, "", _FORMAT)
        if not isinstance(method.router, TopKRouter):
            name = ROUTERS.name_of(method.router)
            raise not_expressible(_FORMAT, f"router {name!r}", "it supports top_k only")
        require_known(method.router, _HANDLED_ROUTER_FIELDS, "router.", _FORMAT)
        _check_model(adapter.model)

    def plan(
        self, adapter: SavedAdapter, base: BaseModel, config: dict[str, Any], options: ExportOptions
    ) -> Plan:
        _check_model(base.config)
        method = adapter.method
        model = extended_model(base.config, method)
        copied = {name: config[name] for name in _COPIED_FIELDS if name in config}
        return Plan(copied | _config_fields(model, method), _tensors(model, method))


def _check_model(model: ModelConfig) -> None:
    """Refuses bases without an equivalent mixture-of-experts architecture."""
    kind = model.model_type
    if kind not in _EXPERT_NAMES:
        reason = f"only {', '.join(_EXPERT_NAMES)} have a mixture-of-experts variant"
        raise not_expressible(_FORMAT, f"a base of type {kind!r}", reason)
    if model.mlp_bias:
        raise not_expressible(_FORMAT, "a base with mlp_bias", "its experts have no biases")
    if model.attention_bias and kind != "qwen3":
        raise not_expressible(_FORMAT, "a base with attention_bias", "Mixtral has no biases")
    if len(set(model.sliding_layers)) > 1:
        raise not_expressible(_FORMAT, "layer_types that differ", "all its layers are of one type")


def _config_fields(model: ModelConfig, method: MixLoraConfig) -> dict[str, Any]:
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
        **_rope_fields(model.rope),
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
        "max_window_layers": 0,  # first layer with a sliding window, for transformers before 5
        "moe_intermediate_size": model.intermediate_size,
        "num_experts": method.num_experts,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _rope_fields(rope: RopeConfig) -> dict[str, Any]:
    """Settings of rotary embeddings, for transformers 5 and for the versions before it."""
    fields = {name: getattr(rope, name) for name in field_names(RopeConfig)}
    # Fixed for the bases of this format; `truncate` belongs to YaRN.
    for name in ("partial_rotary_factor", "interleaved"):
        fields.pop(name)
    if rope.rope_type != "yarn":
        fields.pop("truncate")
    current = {name: value for name, value in fields.items() if value is not None}
    older = {name: value for name, value in current.items() if name != "rope_theta"}
    return {
        "rope_parameters": current,
        "rope_theta": rope.rope_theta,
        "rope_scaling": None if rope.rope_type == "default" else older,
    }


def _tensors(model: ModelConfig, method: MixLoraConfig) -> list[LazyTensor]:
    """Tensors of the checkpoint: those of the base, each FFN replaced by its router and experts."""
    names = _EXPERT_NAMES[model.model_type]
    tensors = []
    for key, parts in base_tensors(model):
        leaf, layer = parts[0]
        projection = ffn_projection("/".join(leaf.path))
        if projection is None:
            tensors.append(merged_tensor(key, parts))
            continue
        block = f"model.layers.{layer}.{names.block}"
        if projection == "gate_proj":  # once a layer
            shape = (method.num_experts, model.hidden_size)
            compute = functools.partial(_router, layer)
            tensors.append(LazyTensor(f"{block}.gate.weight", shape, compute))
        for expert in range(method.num_experts):
            name = f"{block}.experts.{expert}.{names.experts[projection]}.weight"
            compute = functools.partial(_expert, projection, layer, expert, method.expert_low_rank)
            tensors.append(LazyTensor(name, stored_shape(parts), compute))
    return tensors


def _router(layer: int, weights: MergedWeights) -> np.ndarray:
    return weights.router(layer).T


def _expert(
    projection: str, layer: int, expert: int, low_rank: LowRankConfig, weights: MergedWeights
) -> np.ndarray:
    return weights.expert(projection, layer, expert, low_rank).T
