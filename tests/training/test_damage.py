"""Any file of a run may be damaged: the run ends with the same adapters, or one line says why not.

A handful of files is tried. More, drawn at random from all files of a finished and of a stopped
run, and a table of what became of them:

    DAMAGE_TRIALS=500 python -m pytest -s -p no:xdist tests/training/test_damage.py -k many
"""

import collections
import os
import random
import shutil

import numpy as np
import pytest
from damage import FAULTS, cut, empty, files_below, flip, refusal, remove
from one_device import one_device
from tiny_run import CONFIG, metric_lines, read_config, write_inputs

from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.errors import CheckpointError
from moe_jax.training.run.loop import train

TWO_ADAPTERS = """

def get_config():
    adapters = {"short": adapter("train", name="lora"), "long": adapter("other", name="lora")}
    for each in adapters.values():
        each["data"]["buckets"] = ()
    adapters["short"]["steps"] = 4
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32", remat="none"),
        adapters=adapters,
        training=dict(steps=6, log_every=2, eval_every=2, seed=3),
        checkpoints=dict(every=2, keep=3),
    )
"""
NAMES = ("short", "long")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    file = write_inputs(tmp_path_factory.mktemp("inputs"))
    file.write_text(CONFIG + TWO_ADAPTERS)
    return file


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run with states at 2, 4 and 6; one adapter ends at 4, the other at 6."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with one_device():
        train(read_config(config), workdir, lambda _: None)
    return workdir


@pytest.fixture(scope="module")
def stopped(finished, tmp_path_factory):
    """The run as it was when it was killed between the states at 4 and 6."""
    workdir = shutil.copytree(finished, tmp_path_factory.mktemp("stopped") / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.rmtree(workdir / "adapters" / "long")
    for file in workdir.glob("adapters.*"):
        file.unlink()
    return workdir


def weights(folder):
    adapter = load_adapter(folder)
    leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(adapter.tree).items()}
    return adapter.step, adapter.method, adapter.model, leaves


def require_equal(found, expected):
    assert found[:3] == expected[:3]
    assert found[3].keys() == expected[3].keys()
    for path, leaf in expected[3].items():
        np.testing.assert_array_equal(found[3][path], leaf, err_msg=path, strict=True)


class Trial:
    """What became of a copy of a run in which a file is damaged.

    Attributes:
      lines: lines that the run said.
      error: the line with which it was refused; None if it ended.
      unreadable: lines with which its adapters were refused.
    """

    def __init__(self, source, workdir, name, fault, config, finished, **overrides):
        shutil.copytree(source, workdir)
        fault(workdir / name)
        self.lines = []

        def run():
            with one_device():
                return train(read_config(config, **overrides), workdir, self.lines.append)

        self.error = refusal(run, lambda result: None)
        self.unreadable = []
        if self.error is None:
            if name != "metrics.jsonl":
                assert metric_lines(workdir) == metric_lines(finished)
            for folder in [f"{kind}/{name}" for kind in ("adapters", "best") for name in NAMES]:
                expected = weights(finished / folder)
                self.unreadable.append(
                    refusal(
                        lambda folder=folder: weights(workdir / folder),
                        lambda found, expected=expected: require_equal(found, expected),
                    )
                )
        self.unreadable = [line for line in self.unreadable if line is not None]
        assert all(str(workdir) in line for line in [self.error or str(workdir), *self.unreadable])

    def how(self):
        """How the damage was seen."""
        if self.error is not None:
            return "refused"
        if self.unreadable:
            return "its adapter is refused"
        if any("is damaged" in line or "metrics.jsonl: " in line for line in self.lines):
            return "said, same result"
        return "same result"


@pytest.fixture
def attempt(config, finished, stopped, tmp_path):
    """Damages a file of a run and continues it."""

    def run(of, name, fault, **overrides):
        source = {"finished": finished, "stopped": stopped}[of]
        return Trial(source, tmp_path / "run", name, fault, config, finished, **overrides)

    return run


def test_a_damaged_state_is_passed_by(attempt, tmp_path):
    """An adapter that ended after the state before it trains to its end again."""

    def damage(file):
        flip(file)
        metrics = tmp_path / "run" / "metrics.jsonl"
        metrics.write_bytes(b"\xff\n" + metrics.read_bytes())

    result = attempt("stopped", "checkpoints/4/data/metadata", damage)
    assert result.how() == "said, same result"  # of the metrics too
    run, states = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert result.lines[0] == (
        f"{states}/4 is damaged (data/metadata differs from its digest); resuming from step 2; it "
        f"is kept as {states}/4.damaged"
    )
    aside = run / "metrics.damaged.jsonl"
    assert f"{run}/metrics.jsonl: damaged lines (1) were moved to {aside}" in result.lines
    assert aside.read_bytes() == b"\xff\n"
    assert "resumed at step 2" in result.lines
    assert sorted(path.name for path in states.iterdir()) == ["2", "4", "4.damaged", "6"]


def test_a_damaged_state_is_refused_on_request(attempt, tmp_path):
    result = attempt("stopped", "checkpoints/4/digests.json", remove, checkpoints__fall_back=False)
    states = tmp_path / "run" / "checkpoints"
    assert result.error == (
        f"{states}/4 is damaged (digests.json is missing, as in states of earlier releases); copy "
        "it from a backup, or set config.checkpoints.fall_back to resume from step 2"
    )
    assert sorted(path.name for path in states.iterdir()) == ["2", "4"]


def test_a_run_without_an_intact_state_never_starts_again(attempt, config, tmp_path):
    def damage_all(file):
        cut(file)
        shutil.rmtree(file.parents[1] / "2" / "metadata")

    result = attempt("stopped", "checkpoints/4/digests.json", damage_all)
    states = tmp_path / "run" / "checkpoints"
    assert result.error == (
        f"{states}/4 is damaged (digests.json is damaged), and no earlier state is intact; copy it "
        f"from a backup, or delete {states} to train from the start"
    )
    before = {file: file.read_bytes() for file in files_below(tmp_path / "run")}
    with pytest.raises(CheckpointError) as again:  # as often as it is tried
        train(read_config(config), tmp_path / "run", lambda _: None)
    assert str(again.value) == result.error
    assert {file: file.read_bytes() for file in files_below(tmp_path / "run")} == before


def test_every_other_file_of_a_finished_run(attempt, finished, tmp_path):
    """Its states are covered above; of the files of its weights one is enough here."""
    seen = {}
    for number, file in enumerate(files_below(finished)):
        name = file.relative_to(finished).as_posix()
        is_read = "checkpoints/" not in name and "weights/" not in name
        if file.stat().st_size and (is_read or name.endswith("long/weights/manifest.ocdbt")):
            fault = cut if name == "config.json" else (flip, cut, empty)[number % 3]
            seen[name] = attempt("finished", name, fault).how()
            shutil.rmtree(tmp_path / "run")
    refused = {name for name, how in seen.items() if how != "same result"}
    assert refused == {
        "config.json",
        *(f"{kind}/long/weights/manifest.ocdbt" for kind in ("adapters", "best")),
        *(
            f"{kind}/{name}/{file}"
            for kind in ("adapters", "best")
            for name in NAMES
            for file in ("adapter.json", "training.json")
        ),
    }


def test_many(config, finished, stopped, tmp_path):
    """As many random trials as the environment asks for, by default none."""
    draw, counts = random.Random(0), collections.Counter()
    for number in range(int(os.environ.get("DAMAGE_TRIALS", "0"))):
        source = draw.choice([finished, stopped])
        files = [f for f in files_below(source) if f.stat().st_size]
        name = draw.choice(files).relative_to(source).as_posix()
        kind = draw.choice(list(FAULTS))
        fault = FAULTS[kind]
        if kind == "flip":
            place = draw.randrange((source / name).stat().st_size)
            fault = lambda file, place=place: flip(file, place, draw.randrange(8))
        workdir = tmp_path / str(number)
        how = Trial(source, workdir, name, fault, config, finished).how()
        shutil.rmtree(workdir)
        parts = name.split("/")
        item = parts[2] if parts[0] == "checkpoints" else parts[-1]
        if parts[0] in ("adapters", "best"):
            item = "weights" if "weights" in parts else parts[-1]
        counts[f"{source.parent.name[:8]:8} {parts[0]:16} {item:16} {kind:7} {how}"] += 1
        print(f"{number} {name} {kind}: {how}", flush=True)
    for row, count in sorted(counts.items()):
        print(f"{count:4} {row}")
