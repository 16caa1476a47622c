"""MixLoRA on Llama-3-8B, with the hyper-parameters of `llama7b_mixlora.py`.

Train on your own instructions, on all devices:

    python train.py --config configs/llama3_8b_mixlora.py --workdir runs/llama3 \
        --config.base.path=/path/to/Meta-Llama-3-8B \
        --config.adapters.default.data.train.instructions.path=/path/to/train.jsonl
"""

from typing import Any

from ml_collections import ConfigDict

from configs import llama7b_mixlora

HF_CONFIG = {
    **llama7b_mixlora.LLAMA_2_7B,
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


def get_config() -> ConfigDict:
    config: Any = llama7b_mixlora.get_config()
    config.base.path = "meta-llama/Meta-Llama-3-8B"
    config.base.hf_config = HF_CONFIG
    return config
