"""The modules that a PEFT configuration adapts, and the rank and alpha of each.

Modules have their names in transformers, such as `model.layers.0.self_attn.q_proj`. The rules are
those of `check_target_module_exists` and `get_pattern_key` in peft 0.21.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import parse
from moe_jax.exchange.adapter_folder import ConfigFields
from moe_jax.hf.key_table import Leaf, base_leaves
from moe_jax.hf.wrapper import wrapped_names

_ALL_LINEAR = "all-linear"
_ANY_LIST = "[^.]*"


class PairSize(NamedTuple):
    """Rank and alpha of one module's pair."""

    rank: int
    alpha: float


def kernels(model: ModelConfig) -> list[Leaf]:
    """Kernels of the layers' projections; several have a target such as `q_proj` in some models."""
    return [leaf for leaf in base_leaves(model) if leaf.stacked and leaf.path[-1] == "kernel"]


def modules_of(kernel: Leaf) -> list[str]:
    """The module of each layer that holds a kernel; shared with others where they are fused."""
    return [key.removesuffix(".weight") for key in kernel.keys]


def adapted_modules(fields: ConfigFields, model: ModelConfig) -> dict[str, PairSize]:
    """Adapted modules in the order of layers, with the sizes of their pairs.

    Raises:
      CheckpointError: a field is missing or invalid, or no module is adapted.
    """
    targets, excluded = _names(fields, "target_modules"), _names(fields, "exclude_modules", ())
    layers = fields.take("layers_to_transform", Any, None)
    layers = [layers] if isinstance(layers, int) else layers
    layers = parse(tuple[int, ...], layers or (), f"{fields.where}: layers_to_transform")
    lists = _names(fields, "layers_pattern", ())
    lists = ((lists,) if isinstance(lists, str) else lists) or (_ANY_LIST,)
    size = PairSize(fields.take("r", int), fields.take("lora_alpha", float))
    ranks = fields.take("rank_pattern", dict[str, int], {})
    alphas = fields.take("alpha_pattern", dict[str, float], {})
    for name, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        _require_patterns(fields, name, patterns)
    _require_patterns(fields, "layers_pattern", lists)

    def is_adapted(module: str) -> bool:
        if excluded and _matches(module, excluded):
            return False
        if isinstance(targets, str) or module in targets or not layers:
            return _matches(module, targets)
        found = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module) for name in lists)
        number = next((int(match[1]) for match in found if match), None)
        return number in layers and _matches(module, targets)

    everything = [m for kernel in kernels(model) for m in modules_of(kernel)]
    adapted = {
        module: PairSize(
            ranks.get(_pattern(ranks, module), size.rank),
            alphas.get(_pattern(alphas, module), size.alpha),
        )
        for module in everything
        if is_adapted(module)
    }
    if not adapted:
        raise fields.error(
            "target_modules",
            f"{fields.take('target_modules', Any)!r} matches no module of the base, such as "
            f"{everything[0]}",
        )
    return adapted


def _names(fields: ConfigFields, name: str, *default: Any) -> str | tuple[str, ...]:
    """A field that is a pattern or a list of names, or MoE-PEFT's names with true or false."""
    value = fields.take(name, Any, *default)
    if isinstance(value, str):
        if name == "target_modules" and value.lower() == _ALL_LINEAR:
            return ".*"
        _require_patterns(fields, name, [value])
        return value
    if isinstance(value, dict):
        value = [key for key, chosen in value.items() if chosen]
    return parse(tuple[str, ...], value, f"{fields.where}: {name}")


def _require_patterns(fields: ConfigFields, name: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise fields.error(name, f"{pattern!r} is not a valid pattern ({error})") from None


def _matches(module: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in (module, *wrapped_names(module)))
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(patterns: Iterable[str], module: str) -> str:
    """First pattern that the end of a module's name matches; empty without one."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), "")
