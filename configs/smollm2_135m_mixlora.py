"""MixLoRA on SmolLM2-135M: the smallest real model, for a laptop or a first try.

    python train.py --config configs/smollm2_135m_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 0.27 GB in
bfloat16: every device holds a copy. On a CPU add --config.compute.dtype=float32
--config.base.param_dtype=float32.
"""

from typing import Any

from moe_jax.config.recipe import llama_config, recipe

HF_CONFIG = llama_config(
    vocab_size=49152,
    width=576,
    ffn_width=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    positions=8192,
    rope_theta=100000.0,
    tied=True,
)


def get_config() -> dict[str, Any]:
    return recipe("HuggingFaceTB/SmolLM2-135M", hf_config=HF_CONFIG, data_axis=-1, fsdp=1)
