"""MixLoRA on Gemma 3 1B.

    python train.py --config configs/gemma3_1b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 2.0 GB in
bfloat16: every device holds a copy.
"""

from typing import Any

from moe_jax.config.recipe import recipe

HF_CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}


def get_config() -> dict[str, Any]:
    return recipe("google/gemma-3-1b-pt", hf_config=HF_CONFIG, data_axis=-1, fsdp=1)
