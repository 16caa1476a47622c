"""`moe-jax serve` in a process of its own, on a free port of the loopback address."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class ServerProcess(NamedTuple):
    """A server that listens.

    Attributes:
      process: its process; `stderr` has the log after `lines`.
      port: port of the loopback address.
      lines: lines of its log so far.
    """

    process: subprocess.Popen[str]
    port: int
    lines: list[str]


@contextlib.contextmanager
def server_process(base: Path, *flags: str, **environment: str) -> Iterator[ServerProcess]:
    """Starts `moe-jax serve --base BASE *FLAGS`, waits until it listens, and kills it at the end.

    Raises:
      RuntimeError: it ended before it listened; the message is its log.
    """
    command = [sys.executable, "-m", "moe_jax", "serve", "--base", str(base), "--port", "0", *flags]
    variables = {**os.environ, **environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line.rstrip("\n"))
                if line.startswith("serving "):
                    yield ServerProcess(process, int(line.rpartition(":")[2]), lines)
                    return
            raise RuntimeError("\n".join(lines))
        finally:
            process.kill()
