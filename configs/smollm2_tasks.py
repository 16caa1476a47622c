"""MixLoRA and LoRA with equal trainable parameters on SmolLM2-135M-Instruct; three seeds each.

    python train.py --config configs/smollm2_tasks.py

All six adapters share one base and one step. They learn the answers of ARC, OpenBookQA and BoolQ as
text, and are evaluated on the whole test sets by the likelihood of each option, beside the base.
`docs/guide/real_model.md` has the results. Without the hub:

    --config.base.path=FOLDER --config.tasks_folder=FOLDER
"""

import copy
from typing import Any

from configs.smollm2_135m_mixlora import HF_CONFIG
from moe_jax.config.recipe import ALPACA, method_fields, recipe

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = ("arc_easy", "arc_challenge", "openbookqa", "boolq")
# The best of `smollm2_tasks_rates.py` for each method.
LEARNING_RATES = {"mixlora": 4e-3, "lora": 2e-3}
SEEDS = (0, 1, 2)
# A layer has 10,176 weights per unit of rank: 437,568 at rank 43. MixLoRA has 440,832.
METHODS = {
    # No dropout, as no row is read twice.
    "mixlora": method_fields("mixlora", rank=8, dropout=0.0),
    "lora": method_fields("lora", rank=43, dropout=0.0),
}
STEPS = 30


def get_config() -> dict[str, Any]:
    config = run()
    config["adapters"] = {
        f"{name}-{seed}": adapter(name, LEARNING_RATES[name], seed)
        for name in METHODS
        for seed in SEEDS
    }
    for fields in config["adapters"].values():
        # Instructions are not trained on: their loss before and after shows what is forgotten.
        fields["data"]["validation"] = {
            "instructions": {"path": ALPACA, "schema": "instruction", "split": "train[:60]"}
        }
        fields["evaluation"] = {
            "tasks": ("openbookqa", "boolq", "arc_challenge"),
            "protocols": ("choices",),
            "with_base": True,
        }
    return config


def run() -> dict[str, Any]:
    """Fields of the run that all its adapters share."""
    config = recipe(BASE, hf_config=HF_CONFIG, steps=STEPS, data_axis=-1, fsdp=1)
    config["tasks_folder"] = None  # the hub
    config["training"] |= {"log_every": 5, "eval_every": STEPS, "micro_batches": 4}
    config["checkpoints"] = {"every": 5, "keep": 1}
    return config


def adapter(method: str, learning_rate: float, seed: int) -> dict[str, Any]:
    """Fields of an adapter; adapters of equal seed read the same rows in the same order."""
    fields: dict[str, Any] = recipe(BASE, learning_rate=learning_rate)["adapters"]["default"]
    fields["method"] = copy.deepcopy(METHODS[method])
    fields["seed"] = seed
    fields["batch_size"] = 4
    fields["data"] = {
        "train": {task: source(task, "train[:-100]") for task in TASKS},
        "validation": {task: source(task, "train[-100:]") for task in TASKS},
        "max_length": 256,
        "packing": "first_fit",
        "buckets": (48, 96),
    }
    return fields


def source(task: str, split: str) -> dict[str, Any]:
    return {"task": task, "answer": "choice", "split": split}
