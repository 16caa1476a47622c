"""Architectures of the measured models by name. Needs jax and flax only.

`d512` is the small model for comparisons on CPUs: 8 layers of width 512. Its vocabulary has 8,192
tokens, so that most of the FLOPs are in the layers, where methods differ: with 32,000 tokens the
head would have two fifths of the FLOPs. `--vocab` of a benchmark sets another vocabulary size.

The others are published architectures: SmolLM2-135M, JackFram/llama-160m, TinyLlama-1.1B,
Llama-3.2-3B, Llama-2-7B, Llama-3-8B and Llama-2-13B.
"""

import dataclasses
from typing import Any

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import suggest
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import ConfigError

_PLAIN_ROPE = RopeConfig(rope_type="default", rope_theta=10000.0)
_SMOL_ROPE = RopeConfig(rope_type="default", rope_theta=100000.0)
_LLAMA_3_ROPE = RopeConfig(rope_type="default", rope_theta=500000.0)
_LLAMA_3_2_ROPE = RopeConfig(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def _llama(
    width: int,
    ffn_width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab_size: int,
    positions: int = 4096,
    rope: RopeConfig = _PLAIN_ROPE,
    tied: bool = False,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=ffn_width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        hidden_act="silu",
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope=rope,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=tied,
    )


SIZES: dict[str, ModelConfig] = {
    "tiny": _llama(64, 176, 2, 4, 2, 256),
    "d512": _llama(512, 1376, 8, 8, 8, 8192),
    "135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, _SMOL_ROPE, tied=True),
    "160m": _llama(768, 3072, 12, 12, 12, 32000, positions=2048),
    "1.1b": _llama(2048, 5632, 22, 32, 4, 32000, positions=2048),
    "3b": _llama(3072, 8192, 28, 24, 8, 128256, 131072, _LLAMA_3_2_ROPE, tied=True),
    "7b": _llama(4096, 11008, 32, 32, 32, 32000),
    "8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192, _LLAMA_3_ROPE),
    "13b": _llama(5120, 13824, 40, 40, 40, 32000),
}

SIZE_HELP = f"model size, with random weights: {', '.join(SIZES)} (default: %(default)s)"


def model_of(size: str, vocab_size: int | None = None) -> ModelConfig:
    """Returns the architecture named `size`, with another vocabulary size if given.

    Raises:
      ConfigError: the size is unknown, or the vocabulary size is not positive.
    """
    if size not in SIZES:
        raise ConfigError(f"--size: no size is called {size!r}; {suggest(size, SIZES)}")
    model = SIZES[size]
    if vocab_size is None:
        return model
    if vocab_size < 1:
        raise ConfigError(f"--vocab: must be positive, got {vocab_size}")
    return dataclasses.replace(model, vocab_size=vocab_size)


def hf_fields(model: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a model's `config.json`, for transformers and checkpoints."""
    rope = {name: value for name, value in vars(model.rope).items() if value is not None}
    for name in ("truncate", "partial_rotary_factor", "interleaved"):  # not used by these models
        del rope[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_parameters": rope,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
