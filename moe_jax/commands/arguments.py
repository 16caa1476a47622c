"""Arguments that several commands share."""

import argparse
import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import get_args

from moe_jax.config.model import FloatType
from moe_jax.config.parse import FieldError, parse
from moe_jax.config.run import MeshConfig
from moe_jax.errors import ConfigError, error_prefix

# Choices of flags, listed here so that --help and errors do not wait for the import of jax.
# `tests/test_cli.py` compares them with the registries.

EXPORT_FORMATS = {
    "llama": "one dense model of the base's family: LoRA exactly, MixLoRA approximately",
    "mixlora": "MixLoRA, LoRAMoE, MoLA, LoRA for MoE-PEFT; top-k MixLoRA for the mixlora package",
    "mixtral": "top-k MixLoRA and its base as one Mixtral (Llama, Mistral) or Qwen3-MoE (Qwen3)",
    "moe_jax": "every adapter in this library's own format, with a model card, for the hub",
    "peft": "LoRA, rsLoRA, DoRA for peft",
}
"""Names of `exchange.FORMATS`, with a description."""

EXPORT_WEIGHTS = ("average", "utilization")
"""See `exchange.format.Weighting`."""

ROUTERS = ("soft", "switch", "top_k", "top_p")
"""Names of `adapters.routing.router.ROUTERS`."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""See `adapters.tree.TARGET_MODULES`."""

UPCYCLE_TO = ("mixlora", "loramoe", "mola")
"""See `surgery.upcycle.UPCYCLED`."""

GROW_NOISE = 0.01
"""See `surgery.grow.DEFAULT_NOISE`."""

MERGE_WEIGHTS = ("average", "utilization")
"""See `surgery.merge.Weighting`."""


@contextlib.contextmanager
def naming_flags(arguments: argparse.Namespace) -> Iterator[None]:
    """Replaces the names of arguments in errors by the flags of the command line.

    Args:
      arguments: parsed arguments; their field `flags` maps names that differ from a flag's, and
        paths of fields such as `method.rank`, to flags.

    Raises:
      ConfigError: replaces the `FieldError` of an argument that has a flag, and a `ConfigError`
        whose message begins with a path in `flags`, or with a field below it. Names in backticks
        in the reason are replaced too.
    """
    given: dict[str, str] = getattr(arguments, "flags", {})
    flags = {name: f"--{name.replace('_', '-')}" for name in vars(arguments)} | given
    try:
        yield
    except ConfigError as error:
        path, _, reason = str(error).partition(": ")
        for name, flag in (flags if isinstance(error, FieldError) else given).items():
            if path == name or path.startswith(f"{name}."):
                below = f"{path.removeprefix(f'{name}.')}: " if path != name else ""
                reason = re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), reason)
                raise ConfigError(f"{flag}: {below}{reason}") from None
        raise


def listed(text: str) -> list[str]:
    """Non-empty parts of `A,B,...`, stripped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def number(text: str, flag: str) -> int:
    """Parses a whole number.

    Raises:
      ConfigError: the text is not a whole number; names `flag`.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag}: expected whole numbers, got {text!r}") from None


def numbers(text: str, flag: str) -> list[int]:
    """Parses `N,N,...`; raises like `number`."""
    return [number(part, flag) for part in listed(text)]


def unescaped(text: str) -> str:
    r"""Replaces `\n`, `\t` and `\\` by the characters that they denote."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0][1]], text)


_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds `--base` and `--revision`, for `base_path`."""
    parser.add_argument(
        "--base",
        metavar="DIR_OR_ID",
        help="folder in the Hugging Face format, or hub id (default: the adapter's base)",
    )
    parser.add_argument("--revision", help="revision of a hub id")


def add_column(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--column`, for `named_columns`."""
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=NAME",
        help="column of a field of the schema; may be given several times",
    )


def named_columns(given: Iterable[str]) -> dict[str, str]:
    """Column names by field from the values of `--column`; see `SourceConfig.columns`.

    Raises:
      ConfigError: a value is not of the form `FIELD=NAME`, or a field is given twice.
    """
    columns = {}
    for text in given:
        field, equals, name = text.partition("=")
        if not equals or not field:
            raise ConfigError(f"--column {text}: give FIELD=NAME")
        if field in columns:
            raise ConfigError(
                f"--column {text}: {field!r} already has the column {columns[field]!r}; give one"
            )
        columns[field] = name
    return columns


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`, for `named_folders`."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR_OR_ID",
        help="an adapter: its folder, a run's work directory or training state, or a hub id "
        "(default name: the last part of the path); may be given several times",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds `--output`."""
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder that does not exist yet, or is empty",
    )


LESS_MEMORY_FLAGS = "--dtype bfloat16, or --mesh fsdp=-1 where there are several devices"
"""Advice for commands with `add_dtype` and `add_mesh` that run out of memory."""


def add_dtype(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=get_args(FloatType),
        help="dtype of weights and computation (default: %(default)s)",
    )


def add_mesh(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--mesh`, for `mesh_config`."""
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices along data, fsdp and tensor; -1 takes the rest (default: one device)",
    )


def named_folders(given: list[str]) -> dict[str, str]:
    """Parses the values of `--adapter [NAME=]DIR`; the default name is the folder's.

    Raises:
      ConfigError: two adapters have the same name, or one has an empty name.
    """
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if equals and not name:
            raise ConfigError(f"--adapter {text}: no name before '='; give NAME=DIR or DIR")
        if not equals or "/" in name:
            name, folder = Path(text).expanduser().resolve().name, text
        if name in adapters:
            raise ConfigError(
                f"--adapter {text}: another adapter is named {name!r}; give names with NAME=DIR"
            )
        adapters[name] = folder
    return adapters


def mesh_config(text: str | None) -> MeshConfig | None:
    """Parses the value of `--mesh AXIS=N,...`; None is one device.

    Raises:
      ConfigError: an axis is unknown, or a size is not a number.
    """
    if text is None:
        return None
    sizes = {"data": 1}
    for part in listed(text):
        axis, _, size = part.partition("=")
        sizes[axis] = number(size, f"--mesh {axis}")
    return parse(MeshConfig, sizes, "--mesh")


def base_path(base: str | None, adapters: Mapping[str, str], revision: str | None) -> str:
    """Folder or hub id of the base: `--base`, or the one that the adapters were trained on.

    Raises:
      ConfigError: there is neither, or the adapters were trained on different bases.
      CheckpointError: a folder holds no adapter, or the base is no longer at its path.
    """
    if base is not None:
        return base
    if not adapters:
        raise ConfigError("--base: give a folder or hub id, or --adapter")
    from moe_jax.checkpoints.adapter_files import read_description
    from moe_jax.hf.base_model import resolve_recorded
    from moe_jax.loaded.run_adapters import resolve_adapter

    bases = {
        name: read_description(resolve_adapter(folder)).base for name, folder in adapters.items()
    }
    (first, first_base), *others = bases.items()
    for name, other in others:
        if other.fingerprint != first_base.fingerprint:
            raise ConfigError(
                f"--adapter: {first!r} was trained on {first_base.path} and {name!r} on "
                f"{other.path}, which differ; give adapters of one base"
            )
    with error_prefix(f"--base: the base of adapter {first!r}"):
        resolve_recorded(first_base, revision)
    return first_base.path
