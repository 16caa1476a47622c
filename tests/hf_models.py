"""Tiny random transformers models, saved as checkpoints; what ours is compared with."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama in evaluation mode; no weight is zero, one or equal to another's."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 and parameter.mean() == 1.0 else 0.0
            parameter.copy_(centre + 0.15 * torch.randn_like(parameter))
    return model.eval()


def save_tiny_llama(folder: Path, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """The same, also written to `folder` as a Hugging Face checkpoint."""
    model = tiny_llama(seed, **overrides)
    model.save_pretrained(folder)
    return model
