"""MixLoRA on SmolLM3-3B-Base.

    python train.py --config configs/smollm3_3b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 6.2 GB in
bfloat16: every device holds a copy.
"""

from typing import Any

from moe_jax.config.recipe import llama_config, recipe

HF_CONFIG = llama_config(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    vocab_size=128256,
    width=2048,
    ffn_width=11008,
    layers=36,
    heads=16,
    kv_heads=4,
    positions=65536,
    rms_norm_eps=1e-06,
    rope_theta=5000000.0,
    tied=True,
    no_rope_layer_interval=4,
)


def get_config() -> dict[str, Any]:
    return recipe("HuggingFaceTB/SmolLM3-3B-Base", hf_config=HF_CONFIG, data_axis=-1, fsdp=1)
