"""The `moe-jax` command."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from moe_jax.commands import (
    Run,
    adapter_formats,
    describe,
    evaluate,
    generate,
    inspect,
    serve,
    surgery,
    train,
    verify,
)
from moe_jax.commands.arguments import naming_flags
from moe_jax.config.command_line import split_overrides
from moe_jax.config.parse import suggest
from moe_jax.demo import command as demo
from moe_jax.errors import UserError, report
from moe_jax.terminal import shortened, shown
from moe_jax.version import __version__

COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {
    "demo": demo.add,
    "train": train.add_train,
    "plan": train.add_plan,
    "generate": generate.add,
    "serve": serve.add,
    "show": describe.add_show,
    "export": adapter_formats.add_export,
    "import": adapter_formats.add_import,
    "evaluate": evaluate.add,
    "inspect": inspect.add,
    "surgery": surgery.add,
    "verify": verify.add,
}

LINGER = 20.0
"""Largest number of seconds for which a process that ends with an error waits for its threads."""


class Parser(argparse.ArgumentParser):
    """Parser whose errors are one line and name the nearest flag."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, shown(f"error: {shortened(message)} (see {self.prog} --help)\n"))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuses unknown arguments here, where the flags of the subcommand are known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if flag == "--distributed":
                self.error(
                    "--distributed goes with `moe-jax train` only: other commands run in one "
                    "process, on its own devices"
                )
            if not flag.startswith("-"):
                self.error(f"unexpected argument {flag!r}; values follow a flag: --flag VALUE")
            self.error(f"unknown flag {flag}; {suggest(flag, self._option_string_actions)}")
        return parsed, unknown


def main(arguments: list[str] | None = None, *, own_process: bool = False) -> int:
    """Runs a subcommand and returns the exit status.

    The status is 0 on success, 2 for invalid input (one line on stderr), 130 after Ctrl-C and 143
    after SIGTERM (unfinished output is removed; a training run saves its state once it has made a
    step), and 141 if the reader of the output, such as `head`, has closed it.

    Args:
      arguments: arguments of the command line; None takes those of the process.
      own_process: install the hooks and the cache of compiled programs of a command, and after an
        error end the process within `LINGER` seconds; always done for the arguments of the process.
    """
    own_process = own_process or arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="moe-jax", description="Mixtures of LoRA experts on a frozen Llama.")
    parser.add_argument("--version", action="version", version=f"moe-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, add in COMMANDS.items():
        text = (add.__doc__ or "").strip()
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=add(command))
    try:
        overrides: dict[str, str] = {}
        if arguments[:1] in (["train"], ["plan"]):
            arguments, overrides = split_overrides(arguments)
        chosen = parser.parse_args(arguments)
        chosen.overrides = overrides
        if own_process:
            # XLA prints a banner about slow compilation as an error; jax reads this when imported.
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
            from moe_jax.commands.process import set_up_process  # imports jax

            set_up_process()
        with _signals_unwind(own_process), naming_flags(chosen):
            status = chosen.run(chosen)
        sys.stdout.flush()
    except UserError as error:
        status = report(error)
        if own_process:
            threading.Thread(target=_exit_despite_threads, args=(status,), daemon=True).start()
        return status
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe. The rest of the buffer must not raise
        # again when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status or 0


def _exit_despite_threads(status: int) -> None:
    """Ends the process, which is about to end by itself, if other threads keep it alive.

    Those of Orbax wait for ever for a folder that could not be made on a disk that has turned
    read-only. Joining the main thread first would wait for them too: Python joins the threads of
    executors before its main thread counts as ended.
    """
    time.sleep(LINGER)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)


@contextlib.contextmanager
def _signals_unwind(own_process: bool) -> Iterator[None]:
    """Makes SIGINT raise `KeyboardInterrupt` and SIGTERM `SystemExit`, so that commands clean up.

    A second signal ends the process. Has no effect outside the main thread, where Python cannot
    handle signals.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
            # Python drops an exception that is raised in jax's callback of the garbage collector.
            threading.Timer(0.05, signal.raise_signal, [number]).start()
            return
        for each in former:  # also a second signal while this process cleans up
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    former: dict[signal.Signals, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        former[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        if not own_process:
            for number, handler in former.items():
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
