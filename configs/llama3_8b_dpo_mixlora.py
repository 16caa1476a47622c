"""Direct preference optimization of Llama-3-8B-Instruct with MixLoRA.

    python train.py --config configs/llama3_8b_dpo_mixlora.py

The experts and their ranks are those of `llama3_8b_mixlora.py`. Preference training takes smaller
steps than instruction training. Learning rate, its cosine to 0 with a warm-up of a tenth, dropout,
length and the single epoch are those of the Alignment Handbook for DPO with low-rank adapters on a
7B model (`recipes/zephyr-7b-beta/dpo/config_qlora.yaml`, huggingface/alignment-handbook). That file
has a beta of 0.01; here `beta` and the 32 pairs of a step are those of Zephyr (Tunstall et al.,
arXiv:2310.16944, section 4.3), with UltraFeedback as the data. The router losses are those of
instruction training (`recipe`). The reference is the base with the adapter off.
"""

from typing import Any

from configs.llama3_8b_mixlora import HF_CONFIG
from moe_jax.config.recipe import recipe

ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"


def get_config() -> dict[str, Any]:
    config = recipe(
        "meta-llama/Meta-Llama-3-8B-Instruct",
        hf_config=HF_CONFIG,
        data=ULTRAFEEDBACK,
        schema="preference",
        held_out=None,
        max_length=1024,
        buckets=(256, 512),
        batch_size=64,  # two rows a pair
        micro_batches=4,
        learning_rate=5e-6,
        warmup_ratio=0.1,
        epochs=1.0,
    )
    adapter = config["adapters"]["default"]
    adapter["preference"] = {"name": "dpo", "beta": 0.1}
    adapter["optimizer"]["schedule"]["final_fraction"] = 0.0
    source = {"path": ULTRAFEEDBACK, "schema": "preference"}
    adapter["data"] |= {
        "train": {"ultrafeedback": {**source, "split": "train_prefs"}},
        "validation": {"held_out": {**source, "split": "test_prefs"}},
    }
    return config
