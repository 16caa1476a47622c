"""Process that trains peft's LoRA in PyTorch on given weights, with a separate interpreter."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.errors import ConfigError

_CHILD = Path(__file__).with_name("peft_lora.py")
_NEEDED = ("torch", "transformers", "peft", "numpy")
_MISSING = (
    f"import importlib.util as u; print(*[name for name in {_NEEDED} if u.find_spec(name) is None])"
)


def check_python(python: str) -> None:
    """Checks before measuring that an interpreter can train peft's LoRA.

    Raises:
      ConfigError: the interpreter cannot be run, or packages are missing.
    """
    try:
        done = subprocess.run([python, "-c", _MISSING], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"--peft-python {python}: cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ConfigError(f"--peft-python {python}: is not a Python interpreter")
    missing = ", ".join(done.stdout.split())
    if missing:
        raise ConfigError(
            f"--peft: {python} lacks {missing}; pip install -e '.[test]' brings them, or name "
            "another interpreter with --peft-python"
        )


def save_arrays(folder: Path, tree: Any, prefix: str = "") -> None:
    """Writes each leaf as `a.b.c.npy`, one at a time; bfloat16 as int16 of the same bits."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = prefix + jax.tree_util.keystr(path, simple=True, separator=".")
        array = np.asarray(leaf)
        if array.dtype.name == "bfloat16":
            array = array.view(np.int16)
        np.save(folder / f"{name}.npy", array)


class PeftProcess:
    """The running child process.

    Attributes:
      trainable: number of trainable weights.
      threads: number of threads of torch.
      versions: versions of the packages by name.
      losses: loss of each step so far.
      peak_bytes: peak of the memory that torch allocated on a GPU so far; None on a CPU.
    """

    def __init__(self, process: "subprocess.Popen[str]"):
        self._process = process
        self.losses: list[float] = []
        self.peak_bytes: int | None = None
        ready = self._answer()
        self.trainable: int = ready["trainable"]
        self.threads: int = ready["threads"]
        self.versions: dict[str, str] = ready["versions"]

    def step(self) -> float:
        """Runs a step and returns its seconds.

        Raises:
          MemoryError: the step ran out of memory, or the system killed the process.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` raises the cause
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        answer = self._answer()
        self.losses.append(answer["loss"])
        self.peak_bytes = answer["peak_bytes"]
        return answer["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            if status == -9:  # killed by Linux, out of memory
                raise MemoryError("the process of peft was killed")
            raise RuntimeError(f"the process of peft ended with status {status}; see above")
        answer = json.loads(line)
        if "failed" in answer:
            raise MemoryError(answer["failed"])
        if "refused" in answer:
            raise ConfigError(f"--peft: {answer['refused']}; name another with --peft-python")
        return answer


@contextlib.contextmanager
def peft_process(
    python: str, params: Any, adapter: Any, tokens: np.ndarray, settings: Mapping[str, Any]
) -> Iterator[PeftProcess]:
    """Starts the child process with the given base and adapter, ready for its first step.

    Args:
      python: interpreter of the process.
      params: weights of the base, in a float type.
      adapter: initial weights of LoRA.
      tokens: input and target tokens, int [B, S].
      settings: content of `settings.json`, see `peft_lora.py`.

    Raises:
      MemoryError: the model did not fit into memory.
      ConfigError: torch cannot use the device that jax uses.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_arrays(folder, params)
        save_arrays(folder, adapter, prefix="adapter.")
        np.save(folder / "tokens.npy", tokens)
        (folder / "settings.json").write_text(json.dumps(settings))
        command = [python, str(_CHILD), str(folder)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                running = PeftProcess(process)
                for file in folder.iterdir():  # already read, and possibly large
                    file.unlink()
                yield running
            finally:
                process.kill()
