r"""DPO with MixLoRA on the project's tiny Llama; about a minute on two CPU cores.

    moe-jax demo --only-data
    python train.py --config configs/tiny_preferences.py --workdir demo_output/preferences

The base continues a sentence with one of any kind: on plurals, opposites, colors, sums or letters.
Of each pair in the data, the chosen one is on an opposite and the rejected one is not. The rewards
separate within the first steps, and the text that the adapter writes changes:

    moe-jax generate --base moe_jax/demo/base --adapter demo_output/preferences \
        --prompt "The colour of grass is green." --max-new-tokens 24
"""

from typing import Any

import ml_collections

from configs import tiny_mixlora


def get_config() -> ml_collections.ConfigDict:
    config: Any = tiny_mixlora.get_config()
    adapter = config.adapters.default
    adapter.preference = {"name": "dpo", "beta": 0.1}
    adapter.data.train = {"sentences": source("train")}
    adapter.data.validation = {"held_out": source("held_out")}
    adapter.data.max_length = 64
    adapter.optimizer.learning_rate = 1e-3
    adapter.optimizer.schedule.warmup_steps = 5
    adapter.batch_size = 16  # two rows a pair
    config.training = {"steps": 60, "log_every": 10, "eval_every": 20}
    return config


def source(split: str) -> dict[str, str]:
    """Pairs of the demo's data."""
    return {"path": f"demo_output/data/preferences/{split}.jsonl", "schema": "preference"}
