"""MixLoRA on Llama-2-7B, trained on a mixture of five tasks and evaluated on each of them.

    python train.py --config configs/llama7b_mixlora_multitask.py --workdir runs/multitask \
        --config.base.path=/path/to/Llama-2-7b-hf

The run ends with a table of accuracies, counts and standard errors. It is also written to
`runs/multitask/evaluation` as JSON and Markdown, with the answer to each question. The same command
resumes an interrupted run, including its evaluation.

One override adds LoRA with equal trainable parameters. It trains beside MixLoRA in the same step,
on the same rows, and is a row of the same table:

    --config.train_only=None

`--config.train_only=lora` trains it alone. Tasks come from the hub;
`--config.tasks_folder=FOLDER` reads their rows from `FOLDER/TASK/` instead: files with the hub's
columns, named after their split.

Only the data, the evaluation and the second method differ from `llama7b_mixlora.py`.
"""

import copy
import math
from typing import Any

from configs import llama7b_mixlora
from moe_jax.config.recipe import method_fields

# Number of rows of each training split on the hub.
TRAINING_ROWS = {
    "arc_easy": 2251,
    "arc_challenge": 1119,
    "boolq": 9427,
    "openbookqa": 4957,
    "piqa": 16113,
}


def get_config() -> dict[str, Any]:
    config = llama7b_mixlora.get_config()
    config["tasks_folder"] = None  # the hub

    mixlora = config["adapters"]["default"]
    mixlora["data"]["validation"] = {}
    mixlora["data"]["train"] = {
        # The completion is the right option's label (A, true, ...), after the prompt of evaluation.
        # Weights are proportional to the square roots of the sizes: proportional to the sizes, half
        # of the rows would be PIQA's; equal weights would repeat the rows of ARC-Challenge fourteen
        # times as often.
        task: {"task": task, "answer": "label", "weight": round(math.sqrt(rows / 1000), 2)}
        for task, rows in TRAINING_ROWS.items()
    }
    mixlora["evaluation"] = {
        "tasks": tuple(TRAINING_ROWS),
        # As in training.
        "protocols": ("labels",),
        "every": 500,
        # Shows the trend: the standard error is at most 3.2 points.
        "limit_between": 250,
        "row_length": 1024,
        "with_base": True,
    }

    lora = copy.deepcopy(mixlora)
    # A layer has 78,080 weights per unit of rank: 202.4 million in total at rank 81, the nearest to
    # MixLoRA's 203.4 million. (The paper's baseline has rank 80.) alpha / rank is equal.
    lora["method"] = method_fields("lora", rank=81)
    config["adapters"] = {"mixlora": mixlora, "lora": lora}
    config["train_only"] = "mixlora"
    return config
