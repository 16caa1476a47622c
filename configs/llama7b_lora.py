"""LoRA on Llama-2-7B, with as many trainable parameters as `llama7b_mixlora.py`.

    python train.py --config configs/llama7b_lora.py

Only the method differs from the other file.
"""

from typing import Any

from configs import llama7b_mixlora
from moe_jax.config.recipe import method_fields


def get_config() -> dict[str, Any]:
    config = llama7b_mixlora.get_config()
    # A layer has 78,080 weights per unit of rank: 199.9 million in total at rank 80; MixLoRA has
    # 203.4 million. Rank 80 and alpha 160 are the paper's baseline.
    config["adapters"]["default"]["method"] = method_fields("lora", rank=80)
    return config
