"""What several commands read from the command line in the same way."""

import argparse
import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

from moe_jax.config.model import FloatType
from moe_jax.config.parse import FieldError, parse
from moe_jax.config.run import MeshConfig
from moe_jax.errors import ConfigError, named


@contextlib.contextmanager
def naming_flags(arguments: argparse.Namespace) -> Iterator[None]:
    """Says of an argument of ours that is refused in here by which flag it was given.

    Names of other arguments stand in a reason between backticks.

    Args:
      arguments: as parsed; `flags` are those that have another name than the argument.

    Raises:
      ConfigError: in place of a `FieldError` of an argument that was on the command line.
    """
    flags = {name: f"--{name.replace('_', '-')}" for name in vars(arguments)}
    flags |= getattr(arguments, "flags", {})
    try:
        yield
    except FieldError as error:
        if error.field not in flags:
            raise
        reason = re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), error.reason)
        raise ConfigError(f"{flags[error.field]}: {reason}") from None


def listed(text: str) -> list[str]:
    """The parts of `A,B,...`, without blanks and empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def number(text: str, flag: str) -> int:
    """A whole number.

    Raises:
      ConfigError: it is none; names `flag`.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{flag}: expected whole numbers, got {text!r}") from None


def numbers(text: str, flag: str) -> list[int]:
    """The whole numbers of `N,N,...`; raises as `number`."""
    return [number(part, flag) for part in listed(text)]


def unescaped(text: str) -> str:
    r"""A text with `\n`, `\t` and `\\` as the characters that they stand for."""
    return re.sub(r"\\[nt\\]", lambda found: _ESCAPES[found[0][1]], text)


_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Adds `--adapter`, for `named_folders`."""
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR_OR_ID",
        help="an adapter's folder or hub id, called by its last name; may be given several times",
    )


LESS_MEMORY_FLAGS = "--dtype bfloat16, or --mesh fsdp=-1 where there are several devices"
"""What helps every command with `add_dtype` and `add_mesh` where memory does not do."""


def add_dtype(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=get_args(FloatType),
        help="of weights and computation (default: %(default)s)",
    )


def add_mesh(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds `--mesh`, for `mesh_config`."""
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices along data, fsdp and tensor, -1 for the rest (default: one device)",
    )


def named_folders(given: list[str]) -> dict[str, str]:
    """Adapters as `--adapter [NAME=]DIR` gives them, by name; without one by the folder's.

    Raises:
      ConfigError: two have the same name.
    """
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            name, folder = Path(text).expanduser().resolve().name, text
        if name in adapters:
            raise ConfigError(
                f"--adapter {text}: another one is called {name!r}; give names with NAME=DIR"
            )
        adapters[name] = folder
    return adapters


def mesh_config(text: str | None) -> MeshConfig | None:
    """A mesh as `--mesh AXIS=N,...` gives it; None, one device, where the flag is not given.

    Raises:
      ConfigError: an unknown axis, or a size that is no number.
    """
    if text is None:
        return None
    sizes = {"data": 1}
    for part in listed(text):
        axis, _, size = part.partition("=")
        sizes[axis] = number(size, f"--mesh {axis}")
    return parse(MeshConfig, sizes, "--mesh")


def base_path(base: str | None, adapters: Mapping[str, str], revision: str | None) -> str:
    """The base that was given, or the one that the adapters remember.

    Raises:
      ConfigError: there is neither, or the adapters remember several.
      CheckpointError: an adapter's folder holds none, or its base is not where it was.
    """
    if base is not None:
        return base
    if not adapters:
        raise ConfigError("--base: give a folder or hub id; without --adapter there is none to use")
    from moe_jax.checkpoints.adapter_files import read_description
    from moe_jax.hf.base_model import resolve_adapter, resolve_checkpoint

    remembered = {
        name: read_description(resolve_adapter(folder)).base for name, folder in adapters.items()
    }
    (first, own), *others = remembered.items()
    for name, other in others:
        if other.fingerprint != own.fingerprint:
            raise ConfigError(
                f"--adapter: {first!r} was trained on {own.path} and {name!r} on {other.path}, "
                "which differ; give adapters of one base"
            )
    with named(f"--base: the one that adapter {first!r} remembers"):
        resolve_checkpoint(own.path, revision)
    return own.path
