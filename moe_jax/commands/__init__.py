"""Commands: the subcommands of `moe-jax`. `train.py` is one of them.

A command is a function `add(parser)` that adds its arguments to the parser and returns the function
that runs it; its docstring is the command's help. `moe_jax.cli` lists the commands.
"""

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], int | None]
"""Function that runs a command and returns its exit status, None for 0; raises `UserError` for
invalid input."""
