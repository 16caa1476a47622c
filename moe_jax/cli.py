"""The `moe-jax` command. A subcommand is a function that adds its parser to `COMMANDS`."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from moe_jax.checkpoints.adapter_files import read_description
from moe_jax.errors import UserError, report
from moe_jax.version import __version__

Run = Callable[[argparse.Namespace], None]


def _add_show(parser: argparse.ArgumentParser) -> Run:
    """Say what an adapter's folder holds: method, size, and the base it belongs to."""
    parser.add_argument("folder", type=Path, help="an adapter, as in WORKDIR/adapters/NAME")

    def run(arguments: argparse.Namespace) -> None:
        description = read_description(arguments.folder)
        size = sum(math.prod(spec.shape) for spec in description.leaves.values())
        print(f"method   {description.method['name']}")
        for field, value in description.method.items():
            if field != "name":
                print(f"         {field} = {value}")
        print(f"size     {size:,} parameters in {len(description.leaves)} leaves")
        print(f"trained  {description.step} steps, moe_jax {description.package_version}")
        print(f"base     {description.base.path}")
        print(f"         fingerprint {description.base.fingerprint[:16]}")

    return run


COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {"show": _add_show}


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand; what the user got wrong is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(
        prog="moe-jax", description="Mixtures of LoRA experts on a frozen Llama."
    )
    parser.add_argument("--version", action="version", version=f"moe-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add in COMMANDS.items():
        text = (add.__doc__ or "").strip()
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=add(command))
    chosen = parser.parse_args(arguments)
    try:
        chosen.run(chosen)
    except UserError as error:
        return report(error)
    return 0
