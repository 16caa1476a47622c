"""The directive `command-help`: the `--help` text of a command of `moe-jax`."""

import os
import subprocess
import sys
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

COLUMNS = "90"


class CommandHelp(SphinxDirective):
    """`command-help:: surgery prune` shows what `moe-jax surgery prune --help` prints."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Runs the command."""
        arguments = [*self.arguments[0].split(), "--help"]
        done = subprocess.run(
            [sys.executable, "-m", "moe_jax", *arguments],
            env={**os.environ, "COLUMNS": COLUMNS, "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise self.error(f"moe-jax {' '.join(arguments)} failed: {done.stderr}")
        return [nodes.literal_block(done.stdout, done.stdout, language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Enters the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
