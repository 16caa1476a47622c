"""MixLoRA on Llama-3-8B.

    python train.py --config configs/llama3_8b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). All devices share one copy
of the weights.
"""

from typing import Any

from moe_jax.config.recipe import llama_config, recipe

HF_CONFIG = llama_config(
    vocab_size=128256,
    width=4096,
    ffn_width=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    positions=8192,
    rope_theta=500000.0,
)


def get_config() -> dict[str, Any]:
    return recipe("meta-llama/Meta-Llama-3-8B", hf_config=HF_CONFIG)
