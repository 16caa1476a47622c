"""MixLoRA on the demo's tiny Llama and data; a few minutes on two CPU cores.

    moe-jax demo --only-data --output demo_output
    moe-jax train --config demo_output/tiny_mixlora.py --workdir demo_output/run

The first command writes the data and a copy of this file. `moe-jax demo` is both in one, and
compares the result with the frozen base.
"""

import ml_collections

from moe_jax.demo import BASE

DATA = "demo_output/data"
TASKS = ("plural", "opposite", "colour", "sum", "reverse", "sort")


def get_config() -> ml_collections.ConfigDict:
    """The configuration, with data in the folder `DATA`."""
    config = ml_collections.ConfigDict()

    # Pre-trained by `python -m moe_jax.demo.pretrain` on plain sentences; stored in bfloat16.
    config.base = {"path": str(BASE), "param_dtype": "float32"}
    # bfloat16 is no faster on CPUs.
    config.compute = {"dtype": "float32"}

    method = {
        "name": "mixlora",
        # Half the paper's rank and number of experts: the base is 128 wide.
        "rank": 8,
        "alpha": 16.0,
        "num_experts": 4,
        "router": {"name": "top_k", "top_k": 2},
        "dropout": 0.0,  # a short run overfits little
        "init": "kaiming",
        "target_modules": (
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ),
        "losses": {"load_balance": {"coefficient": 0.01}},
    }
    data = {
        "train": {"tasks": source(f"{DATA}/train.jsonl")},
        # One set per task, so that each has its own loss.
        "validation": {task: source(f"{DATA}/validation/{task}.jsonl") for task in TASKS},
        # All rows fit, and one length is one compilation.
        "max_length": 24,
    }
    optimizer = {
        "name": "adamw",
        # Ten times that of a large base: there are few steps, and the factors are small.
        "learning_rate": 3e-3,
        "schedule": {"kind": "cosine", "warmup_steps": 20},
    }
    config.adapters = {
        "default": {"method": method, "data": data, "optimizer": optimizer, "batch_size": 32}
    }

    config.training = {"steps": 400, "log_every": 20, "eval_every": 100}
    config.checkpoints = {"every": 200, "keep": 1}
    return config


def source(path: str) -> dict[str, str]:
    """Data set of questions and answers in the file or folder `path`."""
    return {"path": path, "schema": "instruction", "prompt": "bare"}
