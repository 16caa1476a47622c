"""Adapter methods: what is trained beside the frozen model."""

from moe_jax.adapters.lora import LoraConfig
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.mixlora import MixLoraConfig

METHODS: dict[str, type[AdapterMethod]] = {
    "lora": LoraConfig,
    "mixlora": MixLoraConfig,
}
"""The methods by the name that `method.name` in a configuration gives."""
