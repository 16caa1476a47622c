"""llama.cpp's server as a process, for `benchmarks/serving.py`."""

import contextlib
import http.client
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import ConfigError
from moe_jax.serving.server import bind


@contextlib.contextmanager
def llama_server(program: Path, gguf: Path, rows: int, row_length: int) -> Iterator[int]:
    """Runs llama.cpp's server; yields its port.

    Args:
      program: path of `llama-server`.
      gguf: file of the weights.
      rows: number of answers side by side.
      row_length: number of tokens of a prompt and its answer.

    Raises:
      ConfigError: the server does not start; the message has the last line of its output.
    """
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    flags = ["-m", gguf, "--port", port, "-np", rows, "-c", rows * row_length]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([program, *map(str, flags)], stdout=log, stderr=log)
        try:
            if not _is_healthy(port, process):
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines() or ["nothing"]
                raise ConfigError(f"--llama-server: does not answer; its last line: {lines[-1]}")
            yield port
        finally:
            process.terminate()
            process.wait()


def _is_healthy(port: int, process: "subprocess.Popen[bytes]") -> bool:
    """Waits a minute at most until a server answers; False if it does not, or has ended."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return True
        time.sleep(0.5)
    return False
