"""MixLoRA on Mistral-7B-v0.3.

    python train.py --config configs/mistral_7b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). All devices share one copy
of the weights.
"""

from typing import Any

from moe_jax.config.recipe import llama_config, recipe

HF_CONFIG = llama_config(
    architecture="MistralForCausalLM",
    model_type="mistral",
    vocab_size=32768,
    width=4096,
    ffn_width=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    positions=32768,
    rope_theta=1000000.0,
    sliding_window=None,
)


def get_config() -> dict[str, Any]:
    return recipe("mistralai/Mistral-7B-v0.3", hf_config=HF_CONFIG)
