"""MixLoRA on Qwen3.5-4B-Base: experts on the FFN, LoRA on both kinds of attention.

    python train.py --config configs/qwen3_5_4b_mixlora.py

Settings are those of `llama7b_mixlora.py`; the learning rate follows from the width
(`learning_rate_for` in `moe_jax/config/recipe.py`, with its source). The two narrow projections of
linear attention, `in_proj_a` and `in_proj_b`, stay frozen. The weights take 8.4 GB in bfloat16:
every device holds a copy. A step is two micro-batches, and its plan has 57 GiB (`moe-jax plan`
with jax 0.10.2, compiled for a CPU, which holds weights and activations in float32 too). The
checkpoint also reads images; only its text model is loaded.
"""

from typing import Any

from moe_jax.config.recipe import ALL_PROJECTIONS, DELTA_NET_PROJECTIONS, llama_config, recipe

HF_CONFIG = llama_config(
    architecture="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    vocab_size=248320,
    width=2560,
    ffn_width=9216,
    layers=32,
    heads=16,
    kv_heads=4,
    head_dim=256,
    positions=262144,
    rms_norm_eps=1e-06,
    rope_theta=10000000.0,
    tied=True,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
)


def get_config() -> dict[str, Any]:
    return recipe(
        "Qwen/Qwen3.5-4B-Base",
        hf_config=HF_CONFIG,
        data_axis=-1,
        fsdp=1,
        micro_batches=2,
        target_modules=ALL_PROJECTIONS + DELTA_NET_PROJECTIONS,
    )
