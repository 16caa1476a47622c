"""The lines of `metrics.jsonl`: written, read, and continued by a resumed run."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.files.atomic import write_atomic
from moe_jax.files.disk import disk_errors

METRICS_FILE = "metrics.jsonl"


def read_metrics(file: Path, *, missing_ok: bool = False) -> list[dict[str, Any]]:
    """Lines of a `metrics.jsonl` in their order.

    An unfinished last line, from a process that was killed or is writing now, is left out, and so
    are damaged ones, which the next resumed run sets aside.

    Args:
      file: file to read.
      missing_ok: a file that does not exist has no lines.
    """
    if missing_ok and not file.exists():
        return []
    return [content for _, content in _split_lines(file.read_bytes()) if content is not None]


class JsonLines:
    """Writer of `metrics.jsonl`: a JSON object a line with `step`, the metrics and `time`.

    Damaged lines of a former process are moved to `metrics.damaged.jsonl`.

    Attributes:
      remark: line on what was damaged or changed since the lines were written; None if nothing was.
    """

    def __init__(self, file: Path, resume_step: int, written: Mapping[str, Any] | None = None):
        """Opens the file and removes later lines and an unfinished last line.

        Args:
          file: file to continue, or to create.
          resume_step: last step whose lines are kept.
          written: `identity` when the state of that step was saved; None for a new run. Lines that
            were added since, such as scores of the final evaluation, are removed.

        Raises:
          CheckpointError: the file cannot be read or written.
        """
        self._file = file
        self._count, self._digest = 0, hashlib.sha256()
        self.remark: str | None = None
        with disk_errors(file):
            lines = list(_split_lines(file.read_bytes())) if file.exists() else []
            kept = [text for text, line in lines if line and line["step"] <= resume_step]
            damaged = [text for text, line in lines if line is None]
            for count, text in enumerate(kept):
                if self.identity() == written:
                    kept = kept[:count]
                    break
                self._add(text)
            is_same = written is None or self.identity() == written
            if damaged:
                aside = file.with_suffix(f".damaged{file.suffix}")
                with aside.open("ab") as stream:
                    stream.writelines(text + b"\n" for text in damaged)
                self.remark = f"{file}: damaged lines ({len(damaged)}) were moved to {aside}"
            if written is not None and not is_same:
                missing = written["lines"] - len(kept) - len(damaged)
                what = "changed" if missing <= 0 else f"removed: {missing} of {written['lines']}"
                changed = f"lines up to step {resume_step} were {what}"
                if not damaged:
                    self.remark = f"{file}: {changed}"
                elif missing > 0:
                    self.remark = f"{self.remark}; {changed}"
            write_atomic(file, b"".join(text + b"\n" for text in kept))
            self._stream = file.open("a")

    def identity(self) -> dict[str, Any]:
        """Number and digest of the lines, as JSON values."""
        return {"lines": self._count, "digest": self._digest.hexdigest()}

    def write(self, step: int, line: Mapping[str, Any]) -> None:
        text = json.dumps({"step": step, **line})
        with disk_errors(self._file):
            self._stream.write(text + "\n")
            self._stream.flush()
        self._add(text.encode())

    def _add(self, text: bytes) -> None:
        self._count += 1
        self._digest.update(text + b"\n")

    def close(self) -> None:
        with disk_errors(self._file):
            self._stream.close()


def _split_lines(content: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yields the text and content of each line, None if it is damaged; not an unfinished one."""
    *lines, unfinished = content.split(b"\n")
    for text in filter(None, lines):
        yield text, _parsed(text)
    if unfinished and not _is_beginning(unfinished):
        yield unfinished, _parsed(unfinished)


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _is_beginning(text: bytes) -> bool:
    """True for the beginning of a line, False for a line that something was added to."""
    try:
        json.JSONDecoder().raw_decode(text.decode("utf-8"))
    except json.JSONDecodeError:
        return True
    except (ValueError, RecursionError):  # not UTF-8, or an integer of too many digits
        return False
    return False
