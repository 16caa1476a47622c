"""MixLoRA on the demo's tiny Llama, trained on six tasks from templates and evaluated on each.

    moe-jax demo --only-data
    python train.py --config configs/tiny_multitask.py --workdir demo_output/multitask

The table at the end is also in `demo_output/multitask/evaluation`. With `--config.train_only=None`,
LoRA with equal trainable parameters trains beside MixLoRA in the same step; with
`--config.train_only=lora` it trains alone.
"""

import copy
from typing import Any

import ml_collections

from configs import tiny_comparison, tiny_mixlora

TASKS = tiny_mixlora.TASKS
# The tasks on letters have the most rows and are the hardest.
WEIGHTS = {"reverse": 2.0, "sort": 2.0}


def get_config() -> ml_collections.ConfigDict:
    config: Any = tiny_mixlora.get_config()
    # Has a folder for each task, with its rows and a template.txt for its prompt.
    config.tasks_folder = "demo_output/data/tasks"
    adapter: dict[str, Any] = config.adapters.default.to_dict()
    adapter["data"] = {
        # As in evaluation, the completion is the text of the right choice.
        "train": {
            task: {"task": task, "answer": "choice", "weight": WEIGHTS.get(task, 1.0)}
            for task in TASKS
        },
        # All rows fit, and one length is one compilation.
        "max_length": 32,
    }
    adapter["evaluation"] = {
        "tasks": TASKS,
        # The templates list no options, so the tasks have no labels.
        "protocols": ("choices",),
        "every": 100,
        "limit_between": 20,
        "batch_size": 32,
        "row_length": 32,
        "with_base": True,
    }
    methods = tiny_comparison.methods()
    config.adapters = {
        name: copy.deepcopy(adapter) | {"method": method} for name, method in methods.items()
    }
    config.train_only = "mixlora"
    config.training.eval_every = 0  # there are no validation sets
    return config
