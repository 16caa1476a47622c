"""Fine-tune a frozen Llama with mixtures of LoRA experts, in JAX and Flax Linen.

Names are imported at their first use, so that `import moe_jax` and the model code need only jax,
flax, optax and numpy.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from moe_jax.version import __version__ as __version__

if TYPE_CHECKING:  # the names of `_NAMES`, for type checkers
    from moe_jax import surgery as surgery
    from moe_jax.adapters.lora.lora import LoraConfig as LoraConfig
    from moe_jax.adapters.mixlora import ExpertLoraConfig as ExpertLoraConfig
    from moe_jax.adapters.mixlora import MixLoraConfig as MixLoraConfig
    from moe_jax.adapters.mixtures.loramoe import LoraMoeConfig as LoraMoeConfig
    from moe_jax.adapters.mixtures.mola import MolaConfig as MolaConfig
    from moe_jax.adapters.routing import SoftRouter as SoftRouter
    from moe_jax.adapters.routing import SwitchRouter as SwitchRouter
    from moe_jax.adapters.routing import TopKRouter as TopKRouter
    from moe_jax.adapters.routing import TopPRouter as TopPRouter
    from moe_jax.adapters.tree import TARGET_MODULES as TARGET_MODULES
    from moe_jax.errors import UserError as UserError
    from moe_jax.evaluation.model_evaluation import EvaluationOptions as EvaluationOptions
    from moe_jax.evaluation.model_evaluation import evaluate as evaluate
    from moe_jax.inference.api import generate as generate
    from moe_jax.inference.api import generate_stream as generate_stream
    from moe_jax.inspection import routing_plots as routing_plots
    from moe_jax.inspection.base_description import describe_base as describe_base
    from moe_jax.inspection.report_files import routing_page as routing_page
    from moe_jax.inspection.report_files import save_routing_report as save_routing_report
    from moe_jax.inspection.routing_inspection import InspectionOptions as InspectionOptions
    from moe_jax.inspection.routing_inspection import inspect_routing as inspect_routing
    from moe_jax.library import AdaptedModel as AdaptedModel
    from moe_jax.library import Base as Base
    from moe_jax.library import export_adapter as export_adapter
    from moe_jax.library import import_adapter as import_adapter
    from moe_jax.library import load_adapter as load_adapter
    from moe_jax.library import load_base as load_base
    from moe_jax.library import parse_config as parse_config
    from moe_jax.library import train as train
    from moe_jax.training.records.plan import parameter_count as parameter_count
    from moe_jax.training.records.plots import loss_curves as loss_curves

# Set before any import of transformers, which otherwise advises to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_NAMES = {
    "moe_jax.adapters.lora.lora": "LoraConfig",
    "moe_jax.adapters.mixlora": "ExpertLoraConfig MixLoraConfig",
    "moe_jax.adapters.mixtures.loramoe": "LoraMoeConfig",
    "moe_jax.adapters.mixtures.mola": "MolaConfig",
    "moe_jax.adapters.routing": "SoftRouter SwitchRouter TopKRouter TopPRouter",
    "moe_jax.adapters.tree": "TARGET_MODULES",
    "moe_jax.errors": "UserError",
    "moe_jax.evaluation.model_evaluation": "EvaluationOptions evaluate",
    "moe_jax.inference.api": "generate generate_stream",
    "moe_jax.inspection.base_description": "describe_base",
    "moe_jax.inspection.report_files": "routing_page save_routing_report",
    "moe_jax.inspection.routing_inspection": "InspectionOptions inspect_routing",
    "moe_jax.inspection.routing_plots": "routing_plots",  # the module itself
    "moe_jax.library": "AdaptedModel Base export_adapter import_adapter load_adapter load_base "
    "parse_config train",
    "moe_jax.surgery": "surgery",  # the module itself
    "moe_jax.training.records.plan": "parameter_count",
    "moe_jax.training.records.plots": "loss_curves",
}
"""Public names by their module."""

_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name])
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
