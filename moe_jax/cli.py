"""The `moe-jax` command."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from moe_jax.commands import Run, adapter_formats, describe, evaluate, generate, inspect, surgery
from moe_jax.commands.arguments import naming_flags
from moe_jax.errors import UserError, report
from moe_jax.version import __version__

COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {
    "generate": generate.add,
    "show": describe.add_show,
    "export": adapter_formats.add_export,
    "import": adapter_formats.add_import,
    "evaluate": evaluate.add,
    "inspect": inspect.add,
    "surgery": surgery.add,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status.

    The status is 0 on success, 2 for invalid input (one line on stderr), 130 after Ctrl-C and 143
    after SIGTERM (unfinished output is removed), and 141 if the reader of the output, such as
    `head`, has closed it.
    """
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
    if arguments is None:  # a caller of this function sets up its own process
        from moe_jax.commands.process import set_up_process  # imports jax

        set_up_process()
    try:
        with _sigterm_unwinds(), naming_flags(chosen):
            chosen.run(chosen)
        sys.stdout.flush()
    except UserError as error:
        return report(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. The rest of the buffer must not raise
        # again when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Makes SIGTERM raise `SystemExit`, so that context managers clean up.

    Has no effect outside the main thread, where Python cannot handle signals.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


if __name__ == "__main__":
    sys.exit(main())
