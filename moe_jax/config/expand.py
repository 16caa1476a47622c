"""Fields that change the set of adapters before a configuration is parsed.

`train_only` selects some of the adapters of a file. `sweep` replaces one adapter by a grid: an
adapter for each combination of values.
"""

import copy
import dataclasses
import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moe_jax.config.parse import NAME, ROOT, Registry, parse, registry_of, suggest, to_plain
from moe_jax.errors import ConfigError
from moe_jax.terminal import value_text

TRAIN_ONLY = "train_only"
"""Field of a configuration that names the adapters to train."""

SWEEP = "sweep"
"""Group of a configuration that describes a sweep."""

MAX_SWEEP_ADAPTERS = 64
"""Largest number of adapters of a sweep; more are likely a mistake."""

_GRID = f"{ROOT}.{SWEEP}.grid"


def select_adapters(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Selects the adapters that the field `train_only` names, and removes that field.

    A file can thus describe adapters that are trained beside another one on demand:
    `train_only="lora"` trains that one alone, `train_only=("mixlora", "lora")` both, and
    `train_only=None` all adapters of the file.

    Args:
      raw: nested mappings, as `parse_run_config` takes them.

    Raises:
      ConfigError: an unknown adapter, or an empty list of names.
    """
    raw = {**raw}
    names, adapters = raw.pop(TRAIN_ONLY, None), raw.get("adapters")
    if names is None or not isinstance(adapters, Mapping):
        return raw
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError(
            f"{ROOT}.{TRAIN_ONLY}: expected names of adapters, or None, got {value_text(names)}"
        )
    for name in names:
        if not isinstance(name, str) or name not in adapters:
            raise ConfigError(
                f"{ROOT}.{TRAIN_ONLY}: unknown adapter {value_text(name)}; "
                f"{suggest(name, adapters)}"
            )
    raw["adapters"] = {name: adapter for name, adapter in adapters.items() if name in names}
    return raw


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: an adapter for each combination of the values of a grid.

    The swept adapters train together in one run, on one base model.

    Attributes:
      grid: tuple of values for each swept field of the adapter, by dotted name or in nested groups:
        `{"optimizer.learning_rate": (1e-4, 3e-4)}` or
        `{"optimizer": {"learning_rate": (1e-4, 3e-4)}}`. At most 64 combinations. Required.
      adapter: name of the adapter that is the template; other fields are copied from it. Default
        None: the file's single adapter.
    """

    grid: dict[str, Any]
    adapter: str | None = None


def expand_sweep(
    raw: Mapping[str, Any], adapter_type: type, methods: Registry
) -> Mapping[str, Any]:
    """Replaces the sweep's template by an adapter for each combination of the grid's values.

    The new adapters take the template's place and are named after it and their values:
    `default-learning_rate=0.0001-rank=4`.

    Args:
      raw: nested mappings, as `parse_run_config` takes them; returned unchanged without a sweep.
      adapter_type: dataclass of an adapter.
      methods: adapter methods.

    Raises:
      ConfigError: an unknown field or adapter, a field without values, too many combinations, or
        two adapters of the same name.
    """
    raw = {**raw}
    swept, adapters = raw.pop(SWEEP, None), raw.get("adapters")
    if swept is None or not isinstance(adapters, Mapping):
        return raw
    sweep: SweepConfig = parse(SweepConfig, swept, f"{ROOT}.{SWEEP}")
    template = _template(sweep, adapters)
    description = to_plain(adapters[template])
    if not isinstance(description, Mapping):
        return raw  # `parse` refuses it with a message
    members = _members(
        template, description, _checked_grid(sweep, description, adapter_type, methods)
    )
    raw["adapters"] = {}
    for name, adapter in adapters.items():
        new = members if name == template else [(name, adapter)]
        for member, fields in new:
            if member in raw["adapters"] or (name == template and member in adapters):
                raise ConfigError(
                    f"{_GRID}: makes the adapter {member!r}, which already exists; remove "
                    "duplicate values, or rename that adapter"
                )
            raw["adapters"][member] = fields
    return raw


def _checked_grid(
    sweep: SweepConfig, description: Any, adapter_type: type, methods: Registry
) -> dict[str, Any]:
    """Values of each dotted field of the grid; raises `ConfigError` if the grid is invalid."""
    grid = dict[str, Any]()
    for field, values in _fields(sweep.grid):
        if field in grid:
            raise ConfigError(f"{_GRID}.{field}: is given twice; join the two")
        grid[field] = values
    if not grid:
        raise ConfigError(f"{_GRID}: names no field; give one with its values, or leave the sweep")
    for field, values in grid.items():
        _require_field(field, description, adapter_type, methods)
        if not isinstance(values, list | tuple):
            raise ConfigError(
                f"{_GRID}.{field}: expected a tuple of values, got {value_text(values)}"
            )
        if not values:
            raise ConfigError(f"{_GRID}.{field}: names no value")
    sizes = [len(values) for values in grid.values()]
    if math.prod(sizes) > MAX_SWEEP_ADAPTERS:
        product = " x ".join(map(str, sizes))
        raise ConfigError(
            f"{_GRID}: {product} = {math.prod(sizes)} adapters, more than {MAX_SWEEP_ADAPTERS}; "
            "leave values out"
        )
    return grid


def _template(sweep: SweepConfig, adapters: Mapping[str, Any]) -> str:
    name = sweep.adapter
    if name is None and len(adapters) == 1:
        return next(iter(adapters))
    if name is None or name not in adapters:
        problem = "is not given" if name is None else f"unknown adapter {name!r}"
        hint = suggest(name or "", adapters)
        raise ConfigError(f"{ROOT}.{SWEEP}.adapter: {problem}; {hint}")
    return name


def _fields(grid: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted fields of a grid with their values."""
    for name, values in grid.items():
        if isinstance(values, Mapping):
            yield from _fields(values, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", values


def _require_field(field: str, description: Any, adapter_type: type, methods: Registry) -> None:
    """Refuses a dotted field that the adapter does not have."""
    hint: Any = adapter_type
    node = description
    for part in field.split("."):
        hint = _without_none(hint)
        registry = hint if isinstance(hint, Registry) else registry_of(hint)
        if registry is not None:
            name = node.get(NAME)
            if not isinstance(name, str) or name not in registry:
                return  # `parse` refuses it with a message
            hint = registry[name]
        if dataclasses.is_dataclass(hint):
            hints = {f.name: typing.get_type_hints(hint)[f.name] for f in dataclasses.fields(hint)}
            if hint is adapter_type:
                hints["method"] = methods
            if registry is not None:
                hints[NAME] = str
            if part not in hints:
                near = suggest(part, hints)
                raise ConfigError(f"{_GRID}.{field}: unknown field {part!r}; {near}")
            hint, named = hints[part], {}
        elif typing.get_origin(hint) in (dict, Mapping):
            # The key is the default of the member's `name`, see `parse`.
            hint, named = typing.get_args(hint)[1], {NAME: part}
        elif hint is Any:
            return
        else:
            raise ConfigError(f"{_GRID}.{field}: {part!r} would be a field of a single value")
        node = node.get(part) if isinstance(node, Mapping) else None
        node = {**named, **(node if isinstance(node, Mapping) else {})}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        return choices[0] if len(choices) == 1 else hint
    return hint


def _members(
    template: str, description: Mapping[str, Any], grid: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    """Name and description of each combination; the last field's values vary fastest."""
    keys, members = _short_names(list(grid)), []
    for values in itertools.product(*grid.values()):
        fields = dict(copy.deepcopy(description))
        name = template
        for field, value in zip(grid, values, strict=True):
            plain = to_plain(value)
            _set(fields, field, plain)
            name += f"-{keys[field]}={_label(plain, field)}"
        members.append((name, fields))
    return members


def _set(fields: dict[str, Any], field: str, value: Any) -> None:
    *groups, last = field.split(".")
    for part in groups:
        if fields.get(part) is None:
            fields[part] = {}
        fields = fields[part]
        if not isinstance(fields, dict):
            raise ConfigError(f"{_GRID}.{field}: {part!r} is a single value here")
    fields[last] = copy.deepcopy(value)


def _short_names(fields: list[str]) -> dict[str, str]:
    """Shortest suffix of each dotted field that tells it from the others."""
    names = {}
    for field in fields:
        parts, count = field.split("."), 1
        while sum(other.split(".")[-count:] == parts[-count:] for other in fields) > 1:
            count += 1
        names[field] = ".".join(parts[-count:])
    return names


def _label(value: Any, field: str) -> str:
    """A value as part of an adapter's name, which is also a folder's name."""
    if isinstance(value, Mapping):
        if not isinstance(value.get(NAME), str):
            raise ConfigError(
                f"{_GRID}.{field}: a value is a group of fields without a name; give it {NAME!r}, "
                "or sweep over its fields"
            )
        return _label(value[NAME], field)
    if isinstance(value, list | tuple):
        return "+".join(_label(item, field) for item in value) or "none"
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", str(value))
