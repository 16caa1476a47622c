"""MixLoRA on a mix of six tasks of one's own, and how it does on each; the demo's tiny Llama.

    python -m moe_jax.demo --only-data --output demo_output
    python train.py --config configs/tiny_multitask.py --workdir demo_output/multitask

The table at the end is also in `demo_output/multitask/evaluation`. LoRA of as many trainable
parameters trains beside it, in the same step, with `--config.train_only=None`, and alone with
`--config.train_only=lora`.
"""

import copy
from typing import Any

import ml_collections

from configs import tiny_comparison, tiny_mixlora

TASKS = tiny_mixlora.TASKS
# Letters have the most rows and are the hardest; equal shares would repeat colours most.
WEIGHTS = {"reverse": 2.0, "sort": 2.0}


def get_config() -> ml_collections.ConfigDict:
    config: Any = tiny_mixlora.get_config()
    # A folder for each task, with its rows and a template.txt that says how they are asked.
    config.tasks_folder = "demo_output/data/tasks"
    adapter: dict[str, Any] = config.adapters.default.to_dict()
    adapter["data"] = {
        # What is learned is what is measured: the words of the right choice after the prompt.
        "train": {
            task: {"task": task, "answer": "choice", "weight": WEIGHTS.get(task, 1.0)}
            for task in TASKS
        },
        # All rows fit; a single length is a single compilation.
        "max_length": 32,
    }
    adapter["evaluation"] = {
        "tasks": TASKS,
        # The template lists no options, so that there is no label to ask for.
        "protocols": ("choices",),
        "every": 100,
        "limit_between": 20,
        "batch_size": 32,
        "buckets": (32,),
        "with_base": True,
    }
    methods = tiny_comparison.methods()
    config.adapters = {
        name: copy.deepcopy(adapter) | {"method": method} for name, method in methods.items()
    }
    config.train_only = "mixlora"
    config.training.eval_every = 0  # there are no validation sets
    return config
