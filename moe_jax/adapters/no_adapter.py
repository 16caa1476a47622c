"""The method of rows that no adapter changes, beside rows that some do."""

from dataclasses import dataclass

import flax.linen as nn

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.targets import TARGET_MODULES


@dataclass(frozen=True, kw_only=True)
class NoAdapter(AdapterMethod):
    """Leaves its rows to the base. It has no weights and no name in a configuration."""

    rank: int = 1
    alpha: float = 1.0
    target_modules: tuple[str, ...] = TARGET_MODULES

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        return None
