"""Sweep on the demo's tiny Llama: MixLoRA at three learning rates and two ranks, all at once.

    moe-jax demo --only-data
    python train.py --config configs/tiny_sweep.py --workdir demo_output/sweep

Six adapters share one base and one step; the table at the end ranks them.
"""

from typing import Any

import ml_collections

from configs import tiny_mixlora


def get_config() -> ml_collections.ConfigDict:
    config: Any = tiny_mixlora.get_config()
    config.sweep = {
        "adapter": "default",
        "grid": {"optimizer": {"learning_rate": (3e-4, 1e-3, 3e-3)}, "method": {"rank": (4, 8)}},
    }
    # Six batches of 32 rows would make a step six times as long; small ones show the differences.
    config.adapters.default.batch_size = 8
    # A share of the steps, so that it fits any number of them.
    config.adapters.default.optimizer.schedule = {"kind": "cosine", "warmup_ratio": 0.05}
    config.training.steps = 200
    config.training.eval_every = 100
    return config
