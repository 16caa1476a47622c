"""MixLoRA and LoRA with equal trainable parameters, on the demo's tiny Llama; three seeds each.

    moe-jax demo --only-data
    python train.py --config configs/tiny_comparison.py --workdir demo_output/comparison

All six adapters share one base and one step. `make compare` does this run, scores each adapter on
the held-out questions, and tests whether the methods differ by more than seeds do.
"""

import copy
from typing import Any

import ml_collections

from configs import tiny_mixlora

# The best of 1e-3, 3e-3 and 1e-2 for each method, by the mean loss on the held-out questions over
# two other seeds; see `tiny_comparison_rates.py`.
LEARNING_RATES = {"mixlora": 3e-3, "lora": 3e-3}
SEEDS = (0, 1, 2)


def get_config() -> ml_collections.ConfigDict:
    config: Any = tiny_mixlora.get_config()
    config.adapters = {
        f"{name}-{seed}": adapter(method, LEARNING_RATES[name], seed)
        for name, method in methods().items()
        for seed in SEEDS
    }
    config.training = {"steps": 300, "log_every": 50}
    return config


def methods() -> dict[str, dict[str, Any]]:
    """Configurations of the compared methods, by name."""
    config: Any = tiny_mixlora.get_config()
    mixlora: dict[str, Any] = config.adapters.default.method.to_dict()
    lora = {
        "name": "lora",
        # A layer has 2,336 weights per unit of rank, 53,728 at rank 23. MixLoRA has 53,760,
        # including the router's 512.
        "rank": 23,
        "alpha": 46.0,  # equal alpha / rank
        **{field: mixlora[field] for field in ("dropout", "init", "target_modules")},
    }
    return {"mixlora": mixlora, "lora": lora}


def adapter(method: dict[str, Any], learning_rate: float, seed: int) -> dict[str, Any]:
    """Fields of an adapter; adapters of equal seed read the same rows in the same order."""
    config: Any = tiny_mixlora.get_config()
    fields: dict[str, Any] = config.adapters.default.to_dict()
    fields |= {"method": copy.deepcopy(method), "seed": seed}
    # All questions in one set: the demo scores each task afterwards.
    fields["data"]["validation"] = {"held_out": tiny_mixlora.source("demo_output/data/validation")}
    # A share of the steps, so that it fits any number of them.
    schedule = {"kind": "cosine", "warmup_ratio": 0.05}
    fields["optimizer"] |= {"learning_rate": learning_rate, "schedule": schedule}
    # Half of the rows in `tiny_mixlora.py`: six adapters of 32 rows would take six times as long.
    fields["batch_size"] = 16
    return fields
