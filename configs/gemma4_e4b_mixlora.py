"""MixLoRA on the text model of Gemma 4 E4B.

    python train.py --config configs/gemma4_e4b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The weights take 14.9 GB in
bfloat16, 5.6 GB of them for the embeddings of each layer: every device holds a copy. A step is two
micro-batches: as one, its plan has 109 GiB (`moe-jax plan` with jax 0.10.2, compiled for a CPU,
which holds weights and activations in float32 too). The towers of the checkpoint, for images and
audio, are not read.
"""

from typing import Any

from moe_jax.config.recipe import recipe

HF_CONFIG = {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "vocab_size": 262144,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 42,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_kv_shared_layers": 18,
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
}


def get_config() -> dict[str, Any]:
    return recipe("google/gemma-4-E4B", hf_config=HF_CONFIG, data_axis=-1, fsdp=1, micro_batches=2)
