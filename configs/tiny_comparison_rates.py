"""Search for the learning rates of `tiny_comparison.py`: three per method, two seeds each.

    moe-jax demo --only-data
    python train.py --config configs/tiny_comparison_rates.py --workdir demo_output/rates

Twelve adapters train at once, in some minutes; the table at the end has their losses on the
held-out questions. The means over the two seeds, from which the rates were chosen:

    rate     MixLoRA   LoRA
    1e-3     0.551     0.258
    3e-3     0.225     0.204
    1e-2     0.265     1.316
"""

from typing import Any

import ml_collections

from configs import tiny_comparison

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
# Not the seeds of the comparison, to which the rates would otherwise be fitted.
SEEDS = (10, 11)


def get_config() -> ml_collections.ConfigDict:
    config: Any = tiny_comparison.get_config()
    config.adapters = {
        f"{name}-{rate:.0e}-{seed}": tiny_comparison.adapter(method, rate, seed)
        for name, method in tiny_comparison.methods().items()
        for rate in LEARNING_RATES
        for seed in SEEDS
    }
    return config
