"""Lines of metrics: a resumed run continues them, and loses none to damage in another one."""

import hashlib
import json

import pytest
from damage import files_below

from moe_jax.errors import CheckpointError
from moe_jax.training.records.metric_lines import JsonLines, read_metrics


def line(step):
    return {"step": step, "a/loss": step / 8, "time": {"elapsed_seconds": 0.5}}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def written(file):
    """Lines of the steps 1 to 6; gives their identity after step 4."""
    lines, identity = JsonLines(file, -1), {}
    for step in range(1, 7):
        content = line(step)
        lines.write(content.pop("step"), content)
        identity |= lines.identity() if step == 4 else {}
    lines.close()
    return identity


def resume(file, step, identity=None):
    """Opens the lines as a run that resumes at a step, writes one more, and gives the remark."""
    lines = JsonLines(file, step, identity)
    lines.write(99, {})
    lines.close()
    assert read_metrics(file)[-1] == {"step": 99}
    return lines.remark


def steps(file):
    return [json.loads(text)["step"] for text in file.read_text().splitlines()]


def test_lines_of_later_steps_are_removed(file, written):
    assert read_metrics(file) == [line(step) for step in range(1, 7)]
    before = file.read_bytes().splitlines(keepends=True)
    assert resume(file, 4, written) is None
    assert file.read_bytes().splitlines(keepends=True)[:-1] == before[:4]
    assert resume(file, -1) is None
    assert steps(file) == [99]


def test_lines_that_were_added_after_the_state_are_removed(file, written):
    lines = JsonLines(file, 4, written)
    lines.write(4, {"evaluation/lora/colour/acc": 0.5})  # as after the end of a run
    lines.close()
    assert resume(file, 4, written) is None
    assert steps(file) == [1, 2, 3, 4, 99]


def test_a_run_that_has_resumed_is_identified_as_one_that_has_not(file, written):
    lines = JsonLines(file, 3)
    content = line(4)
    lines.write(content.pop("step"), content)
    assert lines.identity() == written
    lines.close()


@pytest.mark.parametrize("end", ['{"step": 7, "a/lo', "{", '{"step": 7, "a/loss": 0.5'])
def test_an_unfinished_last_line_goes(file, written, end):
    with file.open("a") as stream:
        stream.write(end)
    assert read_metrics(file) == [line(step) for step in range(1, 7)]
    assert resume(file, 6) is None
    assert steps(file) == [1, 2, 3, 4, 5, 6, 99]
    assert files_below(file.parent) == [file]


def test_a_last_line_without_its_end_is_whole(file, written):
    file.write_bytes(file.read_bytes()[:-1])
    assert resume(file, 6) is None
    assert steps(file) == [1, 2, 3, 4, 5, 6, 99]


DAMAGED = {
    "no JSON": b'{"step": 2, "a/loss" 0.25}',
    "no UTF-8": b'{"step": 2, "a/loss": "\xff"}',
    "no object": b"[2]",
    "no step": b'{"stop": 2}',
    "step of another type": b'{"step": "2"}',
    "nested too deeply": b"[" * 100_000,
    "binary": bytes(byte for byte in range(256) if byte != 10),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("place", [0, 1, 5])
def test_a_damaged_line_is_kept_aside_and_no_other_is_lost(file, written, damage, place):
    whole = {"lines": 6, "digest": hashlib.sha256(file.read_bytes()).hexdigest()}
    lines = file.read_bytes().splitlines()
    lines[place] = DAMAGED[damage]
    file.write_bytes(b"\n".join(lines) + b"\n")
    others = [step for step in range(1, 7) if step != place + 1]
    assert read_metrics(file) == [line(step) for step in others]
    aside = file.with_name("metrics.damaged.jsonl")
    assert resume(file, 6, whole) == f"{file}: damaged lines (1) were moved to {aside}"
    assert steps(file) == [*others, 99]
    assert aside.read_bytes() == DAMAGED[damage] + b"\n"
    assert resume(file, 6) is None
    # Further damage is added.
    with file.open("ab") as stream:
        stream.write(b"{}\n")
    assert resume(file, 6) == f"{file}: damaged lines (1) were moved to {aside}"
    assert aside.read_bytes() == DAMAGED[damage] + b"\n{}\n"


def test_a_damaged_end_of_the_last_line_is_kept_aside(file, written):
    text = file.read_bytes()
    file.write_bytes(text[:-1] + b"\x1a")
    assert "damaged lines (1)" in str(resume(file, 6))
    assert steps(file) == [1, 2, 3, 4, 5, 99]
    assert (file.with_name("metrics.damaged.jsonl")).read_bytes().startswith(b'{"step": 6')


def test_what_still_parses_is_kept_and_said(file, written):
    text = file.read_text()
    said = f"{file}: lines up to step 4 were"
    file.write_text(text.replace("0.25", "0.26"))
    assert resume(file, 4, written) == f"{said} changed"
    assert read_metrics(file)[1]["a/loss"] == 0.26
    file.write_text(text[: text.index('{"step": 3')])
    assert resume(file, 4, written) == f"{said} removed: 2 of 4"
    assert steps(file) == [1, 2, 99]
    file.write_text("")
    assert resume(file, 4, written) == f"{said} removed: 4 of 4"
    file.unlink()
    assert resume(file, 4, written) == f"{said} removed: 4 of 4"
    file.write_text(text)
    assert resume(file, 4, written) is None


def test_a_file_that_cannot_be_read(file):
    assert read_metrics(file, missing_ok=True) == []
    with pytest.raises(FileNotFoundError):
        read_metrics(file)
    file.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*: is a directory; fix that"):
        JsonLines(file, 1)
