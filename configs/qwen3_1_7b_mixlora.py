"""MixLoRA on Qwen3-1.7B-Base.

    python train.py --config configs/qwen3_1_7b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 3.4 GB in
bfloat16: every device holds a copy.
"""

from typing import Any

from moe_jax.config.recipe import llama_config, recipe

HF_CONFIG = llama_config(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    vocab_size=151936,
    width=2048,
    ffn_width=6144,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    positions=32768,
    rms_norm_eps=1e-06,
    rope_theta=1000000.0,
    tied=True,
)


def get_config() -> dict[str, Any]:
    return recipe("Qwen/Qwen3-1.7B-Base", hf_config=HF_CONFIG, data_axis=-1, fsdp=1)
