"""Reports of benchmarks: the machine, tables and JSON files. Needs jax only."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from moe_jax.errors import ConfigError, UserError, report

MEBIBYTE = 2**20
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft")


def usable_cores() -> int:
    """Number of cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Describes the machine, its package versions, the date and its load.

    `load_average` is the load of the last minute, near zero on an idle machine.
    """
    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "devices": [device.device_kind for device in devices],
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def one_line(machine: dict[str, Any]) -> str:
    """Formats `machine` as one line, for the head of a table."""
    devices = machine["devices"]
    kind = machine["processor"] if devices[0] == "cpu" else devices[0]
    many = f"{len(devices)} x " if len(devices) > 1 else ""
    load_average = machine["load_average"]
    load = "" if load_average is None else f", load {load_average:.1f}"
    return f"{many}{kind}, {machine['cores']} cores{load}, jax {jax.__version__}, {machine['date']}"


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Disables JAX's compilation cache, so that compile times are measured."""
    former = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", former)


def say(text: str) -> None:
    """Prints progress to standard error, so that standard output has only the figures."""
    print(text, file=sys.stderr, flush=True)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats an aligned table, the first column to the left and the others to the right."""
    lines = [list(headings), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def check_output(output: Path | None) -> None:
    """Checks before measuring that the output file can be written.

    Raises:
      ConfigError: the folder is missing, the path is a folder, or the file cannot be written.
    """
    if output is None:
        return
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.absolute().parent}")
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; name a file")
    existed = output.exists()
    try:
        output.open("ab").close()
        if not existed:
            output.unlink()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"--output {output}: {reason}; name another file") from None


def check_positive(args: Namespace, names: Sequence[str]) -> None:
    """Checks that the numbers of these names in `args` are at least 1.

    Raises:
      ConfigError: one of them is not.
    """
    for name in names:
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be positive")


def check_transformers() -> None:
    """Checks that torch and transformers are installed, for benchmarks with `--alone`.

    Raises:
      ConfigError: one of them is not.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"not installed: {', '.join(missing)}; pip install -e '.[test]', or leave transformers "
            "out with --alone"
        )


_FLAG_OF_FIELD = {
    "attention": "--attention",
    "batch_size": "--rows",
    "max_length": "--length",
    "mesh": "--mesh",
    "micro_batches": "--micro-batches",
    "param_dtype": "--param-dtype",
    "rank": "--rank",
    "remat": "--remat",
}


def refuse(error: UserError) -> int:
    """Prints the error with the flag of the configuration field; returns the exit status."""
    field, _, words = str(error).partition(": ")
    names = field.split(".")
    for place, name in enumerate(names):
        if names[0] == "config" and name in _FLAG_OF_FIELD:
            flag = " ".join([_FLAG_OF_FIELD[name], *names[place + 1 :]])
            return report(ConfigError(f"{flag}: {words}"))
    return report(error)


def write_json(output: Path | None, settings: Namespace, **content: Any) -> None:
    """Writes the flags and `content` to `output`; does nothing without an output."""
    if output is None:
        return
    flags = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(settings).items()
    }
    output.write_text(json.dumps({"settings": flags, **content}, indent=2) + "\n")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
