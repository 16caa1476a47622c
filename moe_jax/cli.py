"""The `moe-jax` command."""

import argparse
import sys
from collections.abc import Callable

from moe_jax.commands import (
    Run,
    evaluate,
    export_adapter,
    generate,
    import_adapter,
    inspect,
    show,
    surgery,
)
from moe_jax.errors import UserError, report
from moe_jax.version import __version__

COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {
    "generate": generate.add,
    "show": show.add,
    "export": export_adapter.add,
    "import": import_adapter.add,
    "evaluate": evaluate.add,
    "inspect": inspect.add,
    "surgery": surgery.add,
}


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


if __name__ == "__main__":
    sys.exit(main())
