"""Plain LoRA on Llama-2-7B with as many trainable parameters as `llama7b_mixlora.py`: the baseline.

Train on your own instructions, on all devices there are:

    python train.py --config configs/llama7b_lora.py --workdir runs/lora \
        --config.base.path=/path/to/Llama-2-7b-hf \
        --config.adapters.default.data.train.instructions.path=/path/to/train.jsonl

Everything but the method is the other file's, so that the two runs differ in nothing else.
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
            # 78,080 weights a layer for each unit of rank: 199.9 million at rank 80, MixLoRA has
            # 203.4 million. Rank 80 and alpha 160 are the paper's own baseline.
            "rank": 80,
            "alpha": 160.0,
            "dropout": mixlora.dropout,
            "init": mixlora.init,
            "target_modules": mixlora.target_modules,
        }
    )
    return config
