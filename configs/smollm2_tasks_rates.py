"""Several learning rates for each method of `smollm2_tasks.py`, compared on validation rows.

    python train.py --config configs/smollm2_tasks_rates.py

The seed is none of those that are compared afterwards. `moe-jax show` prints the losses.
"""

from typing import Any

from configs import smollm2_tasks

LEARNING_RATES = {
    "mixlora": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3),
    "lora": (5e-4, 1e-3, 2e-3, 4e-3),
}
SEED = 10


def get_config() -> dict[str, Any]:
    config = smollm2_tasks.run()
    config["adapters"] = {
        f"{method}-{rate:g}": smollm2_tasks.adapter(method, rate, SEED)
        for method in smollm2_tasks.METHODS
        for rate in LEARNING_RATES[method]
    }
    return config
