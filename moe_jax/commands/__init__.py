"""Subcommands of `moe-jax`, one a file.

Each file has a function `add(parser)` that gives its arguments to the parser and returns what the
command does; its docstring is the command's help. `moe_jax.cli` lists them.
"""

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], None]
"""What a command does with its arguments; it raises `UserError` for what the user got wrong."""
