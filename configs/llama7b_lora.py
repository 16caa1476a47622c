"""LoRA on Llama-2-7B, with as many trainable parameters as `llama7b_mixlora.py`.

    python train.py --config configs/llama7b_lora.py

Only the method differs from the other file.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import llama7b_mixlora


def get_config() -> ConfigDict:
    config: Any = llama7b_mixlora.get_config()
    mixlora = config.adapters.default.method
    config.adapters.default.method = ConfigDict(
        {
            "name": "lora",
            # A layer has 78,080 weights per unit of rank: 199.9 million in total at rank 80;
            # MixLoRA has 203.4 million. Rank 80 and alpha 160 are the paper's baseline.
            "rank": 80,
            "alpha": 160.0,
            "dropout": mixlora.dropout,
            "init": mixlora.init,
            "target_modules": mixlora.target_modules,
        }
    )
    return config
