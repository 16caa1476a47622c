"""MixLoRA on Llama-2-7B on a mix of five tasks at once, and its accuracy on each of them.

    python train.py --config configs/llama7b_mixlora_multitask.py --workdir runs/multitask \
        --config.base.path=/path/to/Llama-2-7b-hf

The run ends with a table of accuracies, counts and standard errors, also in
`runs/multitask/evaluation` as JSON and Markdown, with what was said to each question. The same
command goes on where it was stopped, in the evaluation too.

One override adds LoRA with as many trainable parameters: it trains beside MixLoRA in the same step,
on the same rows, and is a row of the same table:

    --config.train_only=None

`--config.train_only=lora` trains it alone. Tasks come from the hub; `--config.tasks_folder=FOLDER` takes
their rows from `FOLDER/TASK/` instead, files with the hub's columns named after their split.

Everything but the data, the evaluation and the second method is `llama7b_mixlora.py`'s.
"""

import copy
import math
from typing import Any

from ml_collections import ConfigDict

from configs import llama7b_mixlora

# Rows of each training split on the hub.
TRAINING_ROWS = {
    "arc_easy": 2251,
    "arc_challenge": 1119,
    "boolq": 9427,
    "openbookqa": 4957,
    "piqa": 16113,
}


def get_config() -> ConfigDict:
    config: Any = llama7b_mixlora.get_config()
    # None: the hub's data.
    config.tasks_folder = None

    mixlora: Any = config.adapters.default
    mixlora.data.train = ConfigDict(
        {
            # The right option's label (A, true, ...) after the prompt that evaluation asks with.
            # Shares go by the square root of the sizes: by the sizes themselves, half the rows
            # would be PIQA's; equal ones would repeat ARC's challenges fourteen times as often.
            task: {"task": task, "answer": "label", "weight": round(math.sqrt(rows / 1000), 2)}
            for task, rows in TRAINING_ROWS.items()
        }
    )
    mixlora.evaluation = ConfigDict(
        {
            "tasks": tuple(TRAINING_ROWS),
            # How they were trained. "choices" takes a forward pass for each option.
            "protocols": ("labels",),
            "every": 500,
            # Enough to see the trend: a standard error of at most 3.2 points.
            "limit_between": 250,
            "batch_size": 32,
            # Few prompts are longer; the last bucket is always the base's context.
            "buckets": (128, 256, 512),
            "with_base": True,
        }
    )

    lora: Any = copy.deepcopy(mixlora)
    lora.method = ConfigDict(
        {
            "name": "lora",
            # 78,080 weights a layer for each unit of rank: 202.4 million at rank 81, the nearest to
            # MixLoRA's 203.4 million. (The paper's baseline has rank 80.)
            "rank": 81,
            # The same alpha / rank.
            "alpha": 162.0,
            "dropout": mixlora.method.dropout,
            "init": mixlora.method.init,
            "target_modules": mixlora.method.target_modules,
        }
    )
    config.adapters = ConfigDict({"mixlora": mixlora, "lora": lora})
    # Which of the two train; see above.
    config.train_only = "mixlora"
    return config
