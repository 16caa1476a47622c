"""MixLoRA on TinyLlama-1.1B, with the hyper-parameters of `llama7b_mixlora.py`.

Train on your own instructions, on all devices:

    python train.py --config configs/tinyllama_mixlora.py --workdir runs/tinyllama \
        --config.base.path=/path/to/TinyLlama-1.1B-intermediate-step-1431k-3T \
        --config.adapters.default.data.train.instructions.path=/path/to/train.jsonl
"""

from typing import Any

from ml_collections import ConfigDict

from configs import llama7b_mixlora

HF_CONFIG = {
    **llama7b_mixlora.LLAMA_2_7B,
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}


def get_config() -> ConfigDict:
    config: Any = llama7b_mixlora.get_config()
    config.base.path = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
    config.base.hf_config = HF_CONFIG
    # 2.2 GB of weights: one consumer GPU holds a copy, and more of the activations can be kept.
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.compute.remat = "dots"
    return config
