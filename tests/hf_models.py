"""Tiny random transformers models, saved as checkpoints; what ours is compared with."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
# Layers of two kinds, whose fields TINY lacks.
QWEN3_5: dict[str, Any] = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
        "mrope_interleaved": True,
    },
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama in evaluation mode; no weight is zero, one or equal to another's."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.dim() == 1 and parameter.mean() == 1.0 else 0.0
            parameter.copy_(center + 0.15 * torch.randn_like(parameter))
    return model.eval()


def save_tiny_llama(folder: Path, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """The same, also written to `folder` as a Hugging Face checkpoint."""
    model = tiny_llama(seed, **overrides)
    model.save_pretrained(folder)
    return model


TINY_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "attn_implementation": "eager",
}


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of any family in evaluation mode; no weight is zero, one or another's."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**TINY_SIZES, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.dim() == 1 and parameter.mean() == 1.0 else 0.0
            parameter.copy_(center + 0.15 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(1.0 + 0.15 * torch.randn_like(buffer))
    return model.eval()


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "input_linear": ("gate_proj", "up_proj"),
    "output_linear": ("down_proj",),
}
"""Targets in the order of storage in projections of some families, by their names."""

BLOCKS = {
    "global_attn": "self_attn",
    "self_attn_reader": "self_attn",
    "global_attn_reader": "self_attn",
    "wide_mlp": "mlp",
}
"""Names in transformers of blocks that have another name here."""


def merge_lora(
    model: PreTrainedModel,
    tree: dict[str, Any],
    scale: float,
    layers_with: Callable[[str], Sequence[int]] | None = None,
) -> None:
    """Adds the deltas of a LoRA adapter, a tree as in `TrainState.adapters[name]`, to weights.

    `layers_with` gives the layers that have a block; by default all have it.
    """
    for block, targets in tree["layers"].items():
        layers = range(len(model.model.layers)) if layers_with is None else layers_with(block)
        for index, number in enumerate(layers):
            layer = model.model.layers[number]
            block = BLOCKS.get(block, block)
            module = getattr(layer, block if hasattr(layer, block) else f"shared_{block}", layer)
            delta = {
                name: scale * (torch.tensor(leaves["lora_A"][index] @ leaves["lora_B"][index])).T
                for name, leaves in targets.items()
            }
            for name in targets:
                if hasattr(module, name):
                    getattr(module, name).weight.data += delta[name]
                else:
                    fused, order = next(
                        (fused, order)
                        for fused, order in FUSED.items()
                        if name in order and hasattr(module, fused)
                    )
                    first = sum(len(delta[other]) for other in order[: order.index(name)])
                    rows = slice(first, first + len(delta[name]))
                    getattr(module, fused).weight.data[rows] += delta[name]
