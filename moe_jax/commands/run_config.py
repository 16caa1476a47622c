"""Configuration of a run from the flags of `moe-jax train`: of a file, or chosen by defaults."""

import argparse
import pprint
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.commands.arguments import named_columns
from moe_jax.compiled.chips import CHIPS
from moe_jax.config.command_line import apply_overrides, load_config_file
from moe_jax.errors import ConfigError
from moe_jax.terminal import print_shown

CONFIG_FILE = "config.py"
"""File in the work directory with the configuration of a run without `--config`."""


def raw_config(
    arguments: argparse.Namespace,
    workdir: Path,
    overrides: Mapping[str, str],
    devices: Sequence[Any] | None,
) -> tuple[dict[str, Any], str | None]:
    """The configuration before overrides, and for a new run the command for `CONFIG_FILE`."""
    if arguments.config is not None:
        raw = load_config_file(arguments.config)
        _replace_base_and_data(raw, arguments.base, arguments.data)
        return raw, None
    file = workdir.expanduser() / CONFIG_FILE
    command = _command(arguments)
    if file.exists() and not arguments.plan:
        if command not in file.read_text().splitlines():
            raise ConfigError(
                f"{file} was made by another command, which it names; give another --workdir, or "
                f"train from the file with --config {file}"
            )
        return load_config_file(str(file)), None
    if any(field.endswith("data.streaming") for field in overrides):
        raise ConfigError(
            "config.adapters.default.data.streaming: lengths and held-out rows are chosen from all "
            "of the data; write a configuration file that streams, with steps and max_length, and "
            "give it to --config"
        )
    from moe_jax.training.run.defaults import default_config
    from moe_jax.training.run.workdir import is_main_process

    _check_overrides(arguments, overrides)
    length = overrides.get("adapters.default.data.max_length", "")
    raw = default_config(
        arguments.base,
        arguments.data,
        schema=arguments.schema,
        method=arguments.method or "mixlora",
        preference=arguments.preference,
        say=print_shown if is_main_process() else lambda _: None,
        devices=devices,
        memory=None if arguments.compile_for is None else CHIPS[arguments.compile_for].memory_bytes,
        # Anything else is refused later.
        max_length=int(length) if re.fullmatch("[0-9]{1,9}", length) else None,
        columns=named_columns(arguments.column),
    )
    _end_by_steps(raw, overrides)
    return raw, command


def _check_overrides(arguments: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Checks the overrides before the data is read."""
    from moe_jax.adapters import METHODS
    from moe_jax.config.recipe import recipe
    from moe_jax.config.run import parse_run_config

    raw = recipe(
        arguments.base,
        data=arguments.data,
        schema=arguments.schema,
        method=arguments.method or "mixlora",
        preference=arguments.preference,
        columns=named_columns(arguments.column),
        data_axis=-1,
        fsdp=1,
        max_length=2**30,  # longer than any bucket
        buckets=(),
    )
    _end_by_steps(raw, overrides)
    apply_overrides(raw, overrides)
    parse_run_config(raw, METHODS)


def _end_by_steps(raw: dict[str, Any], overrides: Mapping[str, str]) -> None:
    """Removes the epochs of a configuration whose steps are given."""
    if "training.steps" in overrides and "training.epochs" not in overrides:
        raw["training"]["epochs"] = None


def _replace_base_and_data(raw: dict[str, Any], base: str | None, data: str | None) -> None:
    """Sets the base, and the path of the data sets of every adapter, of a configuration file."""
    if base is not None:
        raw.setdefault("base", {})["path"] = base
    adapters = raw.get("adapters")
    if data is None or not isinstance(adapters, Mapping):
        return
    for name, adapter in adapters.items():
        sets = [source for split in ("train", "validation") for source in _sources(adapter, split)]
        paths = {source.get("path") for source in sets}
        if len(paths) != 1 or None in paths:
            raise ConfigError(
                f"--data: adapter {name!r} has several data sets; set their paths with "
                f"--config.adapters.{name}.data.train.NAME.path=FILE"
            )
        for source in sets:
            source["path"] = data


def _sources(adapter: Any, split: str) -> list[dict[str, Any]]:
    sets = adapter.get("data", {}).get(split, {}) if isinstance(adapter, Mapping) else {}
    return [source for source in sets.values() if isinstance(source, dict)]


def _command(arguments: argparse.Namespace) -> str:
    """The flags that decide the configuration of a run without `--config`."""
    names = ("base", "data", "schema", "method", "preference")
    given = {name: getattr(arguments, name) for name in names}
    flags = [f"--{name} {shlex.quote(value)}" for name, value in given.items() if value is not None]
    flags += [f"--column {shlex.quote(text)}" for text in arguments.column]
    return " ".join(["moe-jax train", *flags])


def config_file_text(raw: Mapping[str, Any], command: str, overrides: Mapping[str, str]) -> str:
    """Text of a configuration file that returns `raw`."""
    flags = "".join(f"\n  --set {shlex.quote(f'{k}={v}')}" for k, v in overrides.items())
    fields = pprint.pformat(raw, width=92, sort_dicts=False)
    return f'''"""Configuration made by the command

{command}{flags}

To train with other settings, copy the file and give it to --config, with another --workdir.
"""

CONFIG = {fields}


def get_config():
    return CONFIG
'''
