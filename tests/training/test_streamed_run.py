"""Streamed data, new tokens and a matched rank in one run of two adapters, stopped in every way."""

import json
import shutil
import signal

import numpy as np
import pytest
from tiny_run import WORDS, Run, final_adapter, metric_lines, write_inputs

from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.checkpoints.store import latest_step

ADAPTERS = ("lora", "default")
OVERRIDES = {
    "adapters__lora__method__rank": "match:default",
    "training__steps": 50,
    "training__log_every": 7,
    "training__eval_every": 25,
    "checkpoints__every": 5,
    **{
        f"adapters__{name}__{field}": value
        for name in ADAPTERS
        for field, value in {
            "method__new_tokens": ("<w>", "</w>"),
            "data__streaming": True,
            "data__shuffle_buffer": 16,
            "data__buckets": "()",
        }.items()
    },
}


def lines(count: int) -> list[str]:
    pairs = [(WORDS[i % 12], WORDS[(i * 5 + i // 12) % 12]) for i in range(count)]
    rows = [{"prompt": f"{a} <w>{b}</w> ->", "completion": f"<w>{a}</w>"} for a, b in pairs]
    return [json.dumps(row) + "\n" for row in rows]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """`default`, the second of two adapters, reads train.jsonl; the first one other.jsonl."""
    config = write_inputs(tmp_path_factory.mktemp("inputs"))
    text = config.read_text()
    first = 'adapters=dict(\n            lora=adapter("other", name="lora"),'
    config.write_text(text.replace("adapters=dict(", first, 1))
    for name, count in (("train", 320), ("other", 60), ("held_out", 12)):
        (config.parent / f"{name}.jsonl").write_text("".join(lines(count)))
    return config


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    run = Run(inputs, tmp_path_factory.mktemp("undisturbed") / "run", overrides=OVERRIDES)
    assert run.join(600) == 0, run.log.read_text()
    # LoRA has 2 x 64 + 2 x 48 + 3 x 80 = 464 weights a layer for each unit of rank, and the two new
    # tokens 2 x 32; MixLoRA has 2 x (4 x 224 + 4 x 4 x 240 + 4 x 32) and the same tokens.
    note = "rank 10: 9,344 parameters, nearest to the 9,792 of 'default'"
    assert note in run.log.read_text()
    assert "words: streamed from 1 file" in run.log.read_text()
    return run.workdir


def assert_same_outcome(workdir, expected):
    for name in ADAPTERS:
        mine, theirs = final_adapter(workdir, name), final_adapter(expected, name)
        assert mine.keys() == theirs.keys() and "new_tokens/embedding" in mine
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(mine[path], leaf, err_msg=path, strict=True)
    assert load_adapter(workdir / "adapters" / "lora").method.rank == 10
    assert metric_lines(workdir) == metric_lines(expected)


def test_kills_change_nothing(inputs, undisturbed, tmp_path):
    for times in (1, 3, 4):
        run = Run(inputs, tmp_path / "run", overrides=OVERRIDES)
        run.wait_until("[default]", times=times)
        run.process.kill()
        assert run.join(600) == -signal.SIGKILL, "finished before the kill"
    run = Run(inputs, tmp_path / "run", overrides=OVERRIDES)
    assert run.join(600) == 0, run.log.read_text()
    assert "resumed at step" in run.log.read_text()
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_a_refused_row_keeps_the_steps_before_it(inputs, undisturbed, tmp_path):
    """Row 301 is in the block of rows 289 to 304: there are 288 / 8 = 36 batches before it.

    The first adapter has read its rows of batch 37 when the second one meets the row.
    """
    folder = shutil.copytree(inputs.parent, tmp_path / "inputs")
    rows = lines(320)
    rows[300] = '{"prompt": "the fox"}\n'
    (folder / "train.jsonl").write_text("".join(rows))
    overrides = {**OVERRIDES, "checkpoints__every": 1000, "base__path": inputs.parent / "base"}
    for _ in range(2):  # the second run begins at step 36, and saves nothing new
        run = Run(folder / "config.py", tmp_path / "run", overrides=overrides)
        assert run.join(600) == 2, run.log.read_text()
        *_, error = run.log.read_text().splitlines()
        assert error.startswith("error: config.adapters.default.data.train.words: ")
        assert "train.jsonl: line 301: no column 'completion'" in error
        assert error.endswith("; the state at step 36 is saved; the same command resumes from it")
        assert latest_step(tmp_path / "run" / "checkpoints") == 36
    (folder / "train.jsonl").write_text("".join(lines(320)))
    run = Run(folder / "config.py", tmp_path / "run", overrides=overrides)
    assert run.join(600) == 0, run.log.read_text()
    assert "resumed at step 36" in run.log.read_text()
    assert_same_outcome(tmp_path / "run", undisturbed)


def test_a_row_that_is_refused_before_the_first_step_saves_nothing(inputs, tmp_path):
    folder = shutil.copytree(inputs.parent, tmp_path / "inputs")
    (folder / "train.jsonl").write_text("".join([*lines(256), '{"prompt": "the fox"}\n']))
    overrides = {**OVERRIDES, "adapters__default__data__shuffle_buffer": 1000}
    run = Run(folder / "config.py", tmp_path / "run", overrides=overrides)
    assert run.join(600) == 2
    *_, error = run.log.read_text().splitlines()
    assert "train.jsonl: line 257: no column 'completion'" in error
    assert error.endswith("; no state was saved before")
