"""Adapter methods: what is trained beside the frozen model.

Importing this package enters the methods, routers and losses that come with it in their registries.
"""

import moe_jax.adapters.routing as _routers  # noqa: F401  enters the routing strategies
import moe_jax.adapters.routing.losses as _localized_balance  # noqa: F401  enters the loss
from moe_jax.adapters.lora.lora import LoraConfig as LoraConfig
from moe_jax.adapters.method import METHODS as METHODS
from moe_jax.adapters.mixlora import MixLoraConfig as MixLoraConfig
from moe_jax.adapters.mixtures.loramoe import LoraMoeConfig as LoraMoeConfig
from moe_jax.adapters.mixtures.mola import MolaConfig as MolaConfig
