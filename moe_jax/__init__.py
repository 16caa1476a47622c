"""Fine-tune a frozen Llama with mixtures of LoRA experts, in JAX and Flax Linen.

The names below are imported when they are first used, so that `import moe_jax` and the model code
under it need nothing but jax, flax, optax and numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moe_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from moe_jax import surgery
    from moe_jax.adapters.lora.lora import LoraConfig
    from moe_jax.adapters.mixlora import ExpertLoraConfig, MixLoraConfig
    from moe_jax.adapters.mixtures.loramoe import LoraMoeConfig
    from moe_jax.adapters.mixtures.mola import MolaConfig
    from moe_jax.adapters.routing import SoftRouter, SwitchRouter, TopKRouter, TopPRouter
    from moe_jax.adapters.tree import TARGET_MODULES
    from moe_jax.errors import UserError
    from moe_jax.evaluation.run import evaluate
    from moe_jax.inference.calls import generate, generate_stream
    from moe_jax.inspection.base import describe_base
    from moe_jax.inspection.routing import inspect_routing
    from moe_jax.library import (
        AdaptedModel,
        Base,
        export_adapter,
        import_adapter,
        load_adapter,
        load_base,
        parse_config,
        train,
    )

__all__ = [
    "TARGET_MODULES",
    "AdaptedModel",
    "Base",
    "ExpertLoraConfig",
    "LoraConfig",
    "LoraMoeConfig",
    "MixLoraConfig",
    "MolaConfig",
    "SoftRouter",
    "SwitchRouter",
    "TopKRouter",
    "TopPRouter",
    "UserError",
    "describe_base",
    "evaluate",
    "export_adapter",
    "generate",
    "generate_stream",
    "import_adapter",
    "inspect_routing",
    "load_adapter",
    "load_base",
    "parse_config",
    "surgery",
    "train",
]

_HOMES = {
    "TARGET_MODULES": "moe_jax.adapters.tree",
    "ExpertLoraConfig": "moe_jax.adapters.mixlora",
    "MixLoraConfig": "moe_jax.adapters.mixlora",
    "LoraConfig": "moe_jax.adapters.lora.lora",
    "LoraMoeConfig": "moe_jax.adapters.mixtures.loramoe",
    "MolaConfig": "moe_jax.adapters.mixtures.mola",
    **dict.fromkeys(
        ("SoftRouter", "SwitchRouter", "TopKRouter", "TopPRouter"), "moe_jax.adapters.routing"
    ),
    "describe_base": "moe_jax.inspection.base",
    "evaluate": "moe_jax.evaluation.run",
    **dict.fromkeys(("generate", "generate_stream"), "moe_jax.inference.calls"),
    "inspect_routing": "moe_jax.inspection.routing",
    "UserError": "moe_jax.errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
    if name == "surgery":  # a module, whose functions are its operations
        return importlib.import_module("moe_jax.surgery")
    return getattr(importlib.import_module(_HOMES.get(name, "moe_jax.library")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
