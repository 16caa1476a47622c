"""What a model said about each question, written down at once, so that nothing is asked twice.

A journal is a file of JSON lines. The first says what the rest belongs to; each other line is one
question. While the evaluation runs, lines stand in the order in which the questions were answered;
at its end they are put in the order of the data.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.files.atomic import write_atomic
from moe_jax.files.disk import disk_errors

Record = dict[str, Any]

_MEANINGS = {
    "format": "another format",
    "base": "another base",
    "adapter": "another adapter",
    "items": "other questions (their data, prompts, shots, limit or tokenizer)",
    "dtype": "another dtype",
}
"""The fields of a journal's first line that must agree, and what they stand for."""

FORMAT = 1


class Journal:
    """One journal.

    Attributes:
      records: what was answered so far, by the question's index.
    """

    def __init__(
        self,
        file: Path | None,
        identity: Mapping[str, Any],
        questions: int,
        anew: Collection[str] = (),
    ):
        """Opens a journal, or begins it; nothing is written before the first `add`.

        Args:
          file: ends in `.jsonl`; None keeps the answers in memory only.
          identity: what the answers belong to; plain JSON values.
          questions: how many there are.
          anew: what the file may belong to another one of, and is then begun anew: `adapter`,
            `items`, `dtype`.

        Raises:
          ConfigError: the file belongs to something else.
          CheckpointError: it is damaged, or cannot be read.
        """
        self._file = file
        self._identity = {"format": FORMAT, **identity}
        self._questions = questions
        self._anew = frozenset(anew)
        self._whole_bytes = 0
        self.records: dict[int, Record] = {} if file is None else self._read(file)

    @property
    def is_complete(self) -> bool:
        """Whether every question was answered."""
        return len(self.records) == self._questions

    def add(self, records: Iterable[Record]) -> None:
        """Writes down answers; they survive the process from here on."""
        new = {record["question"]: record for record in records}
        self.records |= new
        if not new or self._file is None:
            return
        with disk_errors(self._file, "what was answered before is kept"):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("r+b" if self._whole_bytes else "wb") as stream:
                # Goes over a line that an earlier run was killed in.
                stream.seek(self._whole_bytes)
                stream.truncate()
                if not self._whole_bytes:
                    stream.write(_line(self._identity))
                stream.write(b"".join(map(_line, new.values())))
                self._whole_bytes = stream.tell()

    def finish(self) -> list[Record]:
        """The answers in the order of the data, in which the file has them from here on."""
        records = [self.records[index] for index in range(self._questions)]
        if self._file is None:
            return records
        with disk_errors(self._file):
            self._file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file, b"".join(map(_line, [self._identity, *records])))
        return records

    def _read(self, file: Path) -> dict[int, Record]:
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from None
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            return {}
        try:
            first, *lines = (json.loads(line) for line in whole.splitlines())
            records = {line["question"]: line for line in lines}
            fits = all(0 <= index < self._questions for index in records)
            differing = [key for key in _MEANINGS if first.get(key) != self._identity.get(key)]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(
                f"{file}: is damaged, or no file of an evaluation; delete it, or give another "
                "output folder"
            ) from None
        if differing and self._anew.issuperset(differing):
            return {}
        if differing or not fits:
            what = ", ".join(_MEANINGS[key] for key in differing) or _MEANINGS["items"]
            raise ConfigError(
                f"{file}: holds the answers of an evaluation with {what}; give another output "
                "folder, or delete this file"
            )
        self._whole_bytes = len(whole)
        return records


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a second evaluation from writing to the same folder at the same time.

    Raises:
      ConfigError: another one is at it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder}: another evaluation is writing here; wait for it, or give another "
                "output folder"
            ) from None
        yield
    finally:
        os.close(lock)
