"""Two processes of one script, which join each other on a free port."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_pair(script: Path, *arguments: object) -> list[str]:
    """Runs `script PORT PROCESS_ID ARGUMENTS...` twice at once; returns what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = [str(script.parent), str(script.parents[1]), str(script.parents[2])]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), port, str(i), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [printed for printed, _ in outputs]
