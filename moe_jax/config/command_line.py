"""Configuration files, and overrides of their fields on the command line."""

import ast
import dataclasses
import importlib.util
import re
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.config.expand import SWEEP, SweepConfig
from moe_jax.config.parse import ROOT, suggest
from moe_jax.config.run import AdapterConfig, RunConfig
from moe_jax.errors import ConfigError

_OVERRIDE = re.compile(rf"--?{ROOT}\.([^=]+)(?:=(.*))?", re.DOTALL)
_ADAPTER_ONLY = {field.name for field in dataclasses.fields(AdapterConfig)} - {
    field.name for field in dataclasses.fields(RunConfig)
}
_WORDS = {"true": True, "false": False, "none": None}


def load_config_file(path: str) -> dict[str, Any]:
    """Runs `get_config()` of a Python file and returns its configuration as nested dicts.

    Raises:
      ConfigError: the file is missing, defines no `get_config`, fails, or has a dict with a
        duplicate key; the message names the line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        others = [other.name for other in file.parent.glob("*.py")]
        raise ConfigError(f"--config: no such file: {path}; {suggest(file.name, others)}")
    spec = importlib.util.spec_from_file_location("_config_file", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config: {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    _require_distinct_keys(file, path)
    folder = str(file.resolve().parent.parent)
    sys.path.append(folder)  # a file in `configs/` may import another: `from configs import ...`
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"--config: {path} defines no function get_config()")
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # the user's file can raise anything
        raise ConfigError(
            f"--config: {path} fails{_line(error, file)}: {_describe(error)}"
        ) from error
    finally:
        sys.path.remove(folder)
    if hasattr(config, "to_dict"):  # ml_collections.ConfigDict
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise ConfigError(f"--config: get_config() in {path} returned no group of fields")
    return _copied(config)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.field=value` and `--config.field value` from all other arguments.

    Returns:
      The other arguments, and the values by dotted path; a later value overrides an earlier one.

    Raises:
      ConfigError: a field without a value.
    """
    others, overrides = [], {}
    remaining = iter(arguments)
    for argument in remaining:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            others.append(argument)
            continue
        path, value = match.groups()
        value = next(remaining, None) if value is None else value
        if value is None:
            raise ConfigError(f"{argument}: has no value; write {argument}=VALUE")
        overrides[path] = value
    return others, overrides


def apply_overrides(config: dict[str, Any], overrides: Mapping[str, str]) -> None:
    """Sets fields of `config` in place; their names and types are checked when it is parsed.

    A value is read as a Python literal, and otherwise as a string: `8`, `1e-4`, `(64, 128)`,
    `None`, `False`, `runs/base`. The value of a string field is always a string
    (`revision=1234567`). Fields that the file leaves out, or sets to None, can be set too.

    Raises:
      ConfigError: the path leads through a field that is not a group, or into an unknown group
        whose name is close to that of a group in the file, or is the path of a field in an adapter.
    """
    for path, text in overrides.items():
        *groups, last = path.split(".")
        first = path.partition(".")[0]
        if first in _ADAPTER_ONLY and first not in config:
            adapters = list(config.get("adapters") or ["NAME"])
            name = adapters[0] if len(adapters) == 1 else "NAME"
            raise ConfigError(
                f"{ROOT}.{path}: is a field of an adapter; give {ROOT}.adapters.{name}.{path}"
            )
        node, where = config, ROOT
        for name in groups:
            known = [key for key, value in node.items() if isinstance(value, dict)]
            if name not in node and "did you mean" in (hint := suggest(name, known)):
                raise ConfigError(f"{where}.{name}: unknown group of fields; {hint}")
            node, where = node.setdefault(name, {}), f"{where}.{name}"
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: is a single value, so it has no field {last!r}")
        node[last] = _value(text, _type_of(path))


def _type_of(path: str) -> Any:
    """Type of a field of `RunConfig`; `Any` for unknown fields and fields of a method."""
    group, *parts = path.split(".")
    roots = {**typing.get_type_hints(RunConfig), SWEEP: SweepConfig}
    hint: Any = roots.get(group, Any)
    for name in parts:
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(name, Any)
        else:
            is_mapping = typing.get_origin(hint) in (dict, Mapping)
            hint = typing.get_args(hint)[1] if is_mapping else Any
    return hint


def _value(text: str, hint: Any) -> Any:
    several = typing.get_origin(hint) in (typing.Literal, typing.Union, types.UnionType)
    choices = typing.get_args(hint) if several else (hint,)
    value = _literal(text)
    if value is None and type(None) in choices:
        return None
    if isinstance(value, list | tuple) and any(typing.get_origin(c) is tuple for c in choices):
        return value
    is_text = str in choices or text in choices
    return text if is_text and not isinstance(value, str) else value


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # `{[]: 1}` raises a TypeError, and deep nesting the last two


def _require_distinct_keys(file: Path, path: str) -> None:
    """Refuses a dict literal with a duplicate key, of which Python silently keeps the last.

    The first of two adapters of the same name would be lost.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # running the file gives a better message
    for node in ast.walk(tree):
        if not isinstance(node, ast.Dict):
            continue
        lines: dict[Any, int] = {}
        for key in node.keys:
            if not isinstance(key, ast.Constant):
                continue
            constant = (type(key.value), key.value)
            if constant in lines:
                raise ConfigError(
                    f"--config: {path} line {key.lineno}: the key {key.value!r} is given twice in "
                    f"one dict, first in line {lines[constant]}; rename or remove one"
                )
            lines[constant] = key.lineno


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in group.items()}


def _line(error: BaseException, file: Path) -> str:
    """Line of the user's file that raised `error`, for messages."""
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == file]
    return f" in line {lines[-1]}" if lines else ""


def _describe(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}"
