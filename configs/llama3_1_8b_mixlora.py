"""MixLoRA on Llama-3.1-8B.

    python train.py --config configs/llama3_1_8b_mixlora.py

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
    positions=131072,
    rope_theta=500000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)


def get_config() -> dict[str, Any]:
    return recipe("meta-llama/Llama-3.1-8B", hf_config=HF_CONFIG)
