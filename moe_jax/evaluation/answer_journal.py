"""Answers of a model, saved as they are computed, so that an evaluation resumes after a stop.

A journal is a file of JSON lines. The first line identifies the evaluation; every other line is one
question. Lines are appended in the order of computation and sorted by question at the end.
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
from moe_jax.files.json_file import parse_json
from moe_jax.training.run.workdir import is_main_process

Record = dict[str, Any]

_IDENTITY_FIELDS = {
    "format": "another format",
    "base": "another base",
    "adapter": "another adapter",
    "items": "other questions (their data, prompts, shots, limit or tokenizer)",
    "dtype": "another dtype",
}
"""Fields of the first line that must match, with the wording of a mismatch."""

JOURNAL_FORMAT_VERSION = 1


class Journal:
    """Answers of one model to one task.

    Attributes:
      records: answers so far, by question index.
    """

    def __init__(
        self,
        file: Path | None,
        identity: Mapping[str, Any],
        questions: int,
        replaceable: Collection[str] = (),
    ):
        """Reads an existing journal, or starts an empty one. The first `add` creates the file.

        Of several processes only the first writes to the file, and all keep the same records. They
        must all have read the file before the first `add`.

        Args:
          file: path that ends in `.jsonl`; None keeps the answers in memory only.
          identity: plain JSON values that identify the evaluation.
          questions: number of questions.
          replaceable: fields of the identity (`adapter`, `items`, `dtype`) that may differ in the
            file; its answers are then discarded.

        Raises:
          ConfigError: the file belongs to another evaluation.
          CheckpointError: the file is damaged or cannot be read.
        """
        self._file = file if is_main_process() else None
        self._identity = {"format": JOURNAL_FORMAT_VERSION, **identity}
        self._questions = questions
        self._replaceable = frozenset(replaceable)
        self._valid_bytes = 0
        self.records: dict[int, Record] = {} if file is None else self._read(file)

    @property
    def is_complete(self) -> bool:
        """True if every question is answered."""
        return len(self.records) == self._questions

    def add(self, records: Iterable[Record]) -> None:
        """Appends answers to the file."""
        new = {record["question"]: record for record in records}
        self.records |= new
        if not new or self._file is None:
            return
        with disk_errors(self._file, "earlier answers are kept"):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("r+b" if self._valid_bytes else "wb") as stream:
                # Overwrites a line that a killed process left incomplete.
                stream.seek(self._valid_bytes)
                stream.truncate()
                if not self._valid_bytes:
                    stream.write(_line(self._identity))
                stream.write(b"".join(map(_line, new.values())))
                self._valid_bytes = stream.tell()

    def finish(self) -> list[Record]:
        """Sorts the file by question and returns all answers in that order."""
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
        complete_lines = content[: content.rfind(b"\n") + 1]
        if not complete_lines:
            return {}
        try:
            first, *lines = (parse_json(line) for line in complete_lines.splitlines())
            records = {line["question"]: line for line in lines}
            in_range = all(0 <= index < self._questions for index in records)
            differing = [
                key for key in _IDENTITY_FIELDS if first.get(key) != self._identity.get(key)
            ]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise CheckpointError(
                f"{file}: is damaged, or not a file of an evaluation; delete it, or give another "
                "output folder"
            ) from None
        if differing and self._replaceable.issuperset(differing):
            return {}
        if differing or not in_range:
            mismatch = ", ".join(_IDENTITY_FIELDS[key] for key in differing)
            raise ConfigError(
                f"{file}: holds the answers of an evaluation with "
                f"{mismatch or _IDENTITY_FIELDS['items']}; give another output folder, or delete "
                "this file"
            )
        self._valid_bytes = len(complete_lines)
        return records


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def journal_file(folder: Path | None, model: str, task: str, protocol: str) -> Path | None:
    """Path of the answers of a model in the results folder; None without a folder."""
    return None if folder is None else folder / "predictions" / model / f"{task}.{protocol}.jsonl"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a results folder against other evaluations.

    Of several processes the first holds the lock for all.

    Raises:
      ConfigError: another process holds the lock.
    """
    if not is_main_process():
        yield
        return
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
