"""MixLoRA on TinyLlama-1.1B: one consumer GPU is enough.

    python train.py --config configs/tinyllama_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 2.2 GB in
bfloat16: every device holds a copy.
"""

from typing import Any

from moe_jax.config.recipe import llama_config, recipe

HF_CONFIG = llama_config(
    vocab_size=32000,
    width=2048,
    ffn_width=5632,
    layers=22,
    heads=32,
    kv_heads=4,
    positions=2048,
)


def get_config() -> dict[str, Any]:
    return recipe(
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        hf_config=HF_CONFIG,
        data_axis=-1,
        fsdp=1,
        remat="dots",
    )
