"""MixLoRA on Phi-4, 14.7B.

    python train.py --config configs/phi4_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 29.3 GB in
bfloat16: all devices share one copy.
"""

from typing import Any

from moe_jax.config.recipe import llama_config, recipe

HF_CONFIG = llama_config(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    vocab_size=100352,
    width=5120,
    ffn_width=17920,
    layers=40,
    heads=40,
    kv_heads=10,
    positions=16384,
    rope_theta=250000.0,
    original_max_position_embeddings=16384,
    sliding_window=None,
)


def get_config() -> dict[str, Any]:
    return recipe("microsoft/phi-4", hf_config=HF_CONFIG)
