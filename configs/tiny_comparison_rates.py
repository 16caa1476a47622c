"""The learning rates of `tiny_comparison.py`: three for each method, two seeds each, all at once.

    python -m moe_jax.demo --only-data --output demo_output
    python train.py --config configs/tiny_comparison_rates.py --workdir demo_output/rates

Twelve adapters, some minutes; the table at the end has their losses on the held-out questions. When
the rates were chosen, these were, as means over the two seeds:

    rate     MixLoRA   LoRA
    1e-3     0.551     0.258
    3e-3     0.225     0.204
    1e-2     0.265     1.316
"""

from typing import Any

import ml_collections

from configs import tiny_comparison

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
# Not those of the comparison: a rate that suits their luck would flatter it.
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
