"""MixLoRA on SmolLM2-1.7B.

    python train.py --config configs/smollm2_1_7b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 3.4 GB in
bfloat16: every device holds a copy.
"""

from typing import Any

from moe_jax.config.recipe import llama_config, recipe

HF_CONFIG = llama_config(
    vocab_size=49152,
    width=2048,
    ffn_width=8192,
    layers=24,
    heads=32,
    positions=8192,
    rope_theta=130000.0,
    tied=True,
)


def get_config() -> dict[str, Any]:
    return recipe("HuggingFaceTB/SmolLM2-1.7B", hf_config=HF_CONFIG, data_axis=-1, fsdp=1)
