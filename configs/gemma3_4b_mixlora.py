"""MixLoRA on the text model of Gemma 3 4B.

    python train.py --config configs/gemma3_4b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 7.8 GB in
bfloat16: every device holds a copy. The vision tower of the checkpoint is not read.
"""

from typing import Any

from moe_jax.config.recipe import recipe

HF_CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def get_config() -> dict[str, Any]:
    return recipe("google/gemma-3-4b-pt", hf_config=HF_CONFIG, data_axis=-1, fsdp=1)
