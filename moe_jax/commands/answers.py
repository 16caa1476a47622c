"""Where answers go: on stdout in the order of their prompts, or into a file as they come."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from moe_jax.commands.prompt_files import GivenPrompt
from moe_jax.errors import ConfigError
from moe_jax.files.atomic import write_atomic
from moe_jax.files.disk import disk_errors
from moe_jax.inference.text_generator import Answer
from moe_jax.loaded.model import BASE

_SHOWN = 60
"""Characters of a prompt above its answer."""


class Wanted(NamedTuple):
    """A prompt that one adapter, or the base, is to answer.

    Attributes:
      number: of the prompt among those given, from 0.
      given: the prompt.
      adapter: None is the base.
    """

    number: int
    given: GivenPrompt
    adapter: str | None


def check_output(file: Path) -> None:
    """Refuses a file for answers.

    Raises:
      ConfigError: there is such a file already, or its ending is another.
    """
    if file.suffix.lower() != ".jsonl":
        raise ConfigError(f"--output {file}: must end in .jsonl")
    if file.exists():
        raise ConfigError(f"--output {file}: is there already; give a name that is not")


class Shown:
    """Answers on stdout, each as soon as all before it are there."""

    def __init__(self, wanted: Sequence[Wanted], samples: int):
        self._wanted = wanted
        self._order = [(i, sample) for i in range(len(wanted)) for sample in range(samples)]
        self._samples = samples
        self._waiting: dict[tuple[int, int], Answer] = {}

    def add(self, answers: Sequence[Answer]) -> None:
        """Takes the answers of a batch; `Answer.prompt` is an index into all that is wanted."""
        self._waiting |= {(answer.prompt, answer.sample): answer for answer in answers}
        while self._order and self._order[0] in self._waiting:
            place = self._order.pop(0)
            print(f"{self._heading(*place)}\n{self._waiting.pop(place).text}\n", flush=True)

    def _heading(self, wanted: int, sample: int) -> str:
        number, given, adapter = self._wanted[wanted]
        parts = [f"prompt {number + 1}"]
        if any(one.adapter is not None for one in self._wanted):
            parts.append(BASE if adapter is None else adapter)
        if self._samples > 1:
            parts.append(f"sample {sample + 1}")
        text = given.text or str(given.messages[-1]["content"])
        line = " ".join(text.split())
        return f"[{', '.join(parts)}] {line if len(line) <= _SHOWN else line[:_SHOWN] + '...'}"


class Written:
    """Answers in a file of JSON lines: as the batches finish, and in order once all are there."""

    def __init__(self, file: Path, wanted: Sequence[Wanted], samples: int):
        self._file = file
        self._wanted = wanted
        self._total = len(wanted) * samples
        self._lines: dict[tuple[int, int], str] = {}
        self._open: Any = None

    def __enter__(self) -> Self:
        with disk_errors(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._open = self._file.open("x", encoding="utf-8")
        return self

    def add(self, answers: Sequence[Answer]) -> None:
        """Takes the answers of a batch; `Answer.prompt` is an index into all that is wanted."""
        with disk_errors(self._file, "the answers before are there"):
            for answer in answers:
                line = json.dumps(self._row(answer), ensure_ascii=False) + "\n"
                self._lines[answer.prompt, answer.sample] = line
                self._open.write(line)
            self._open.flush()
        print(f"{len(self._lines)} of {self._total} answers", file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._open.close()
        if not self._lines:
            self._file.unlink()
        elif kind is None:
            ordered = "".join(self._lines[place] for place in sorted(self._lines))
            write_atomic(self._file, ordered, "all answers are there, but not in order")
            print(f"wrote {self._file}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(
                f"stopped; {len(self._lines)} of {self._total} answers are in {self._file}",
                file=sys.stderr,
            )

    def _row(self, answer: Answer) -> dict[str, Any]:
        number, given, adapter = self._wanted[answer.prompt]
        row: dict[str, Any] = {"index": number}
        if given.id is not None:
            row["id"] = given.id
        if given.messages is None:
            row["prompt"] = given.text
            if given.material:
                row["input"] = given.material
        else:
            row["messages"] = given.messages
        return row | {
            "adapter": adapter,
            "sample": answer.sample,
            "text": answer.text,
            "tokens": answer.tokens,
            "finish": answer.finish,
        }
