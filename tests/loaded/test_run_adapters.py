"""Adapters by the paths of a run."""

import json
import shutil

import numpy as np
import pytest
from tiny_run import Run, final_adapter, write_inputs

from moe_jax.cli import main
from moe_jax.errors import CheckpointError
from moe_jax.files.digests import content_digest
from moe_jax.loaded.run_adapters import resolve_adapter

SHORT = {"training__steps": 4, "checkpoints__every": 2, "adapters__default__data__buckets": "()"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run_adapters")
    run = Run(write_inputs(folder / "inputs"), folder / "run", overrides=SHORT)
    assert run.join() == 0, run.log.read_text()
    return run.workdir


@pytest.fixture
def stopped(finished, tmp_path):
    """The run as it was before its adapter was written."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "adapters")
    return workdir


def _step(folder):
    return json.loads((folder / "adapter.json").read_text())["step"]


def _require_equal(folder, expected):
    actual = final_adapter(folder.parent.parent, folder.name, folder.parent.name)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf)


def test_a_finished_run_names_its_adapter(finished):
    folder = finished / "adapters" / "default"
    assert resolve_adapter(finished) == folder
    assert resolve_adapter(folder) == folder


@pytest.mark.parametrize(
    "path", [".", "adapters", "adapters/default", "checkpoints/4", "stopped", "stopped/"]
)
def test_the_newest_state_of_a_stopped_run_holds_its_adapter(finished, stopped, path):
    folder = resolve_adapter(stopped / path)
    assert folder == stopped / "stopped" / "default"
    _require_equal(folder, final_adapter(finished))


def test_the_folder_of_an_adapter_taken_from_a_state(finished, stopped):
    resolve_adapter(stopped / "checkpoints/2")
    # As it was written; the folder above it stands for the run, whose newest state is another.
    assert resolve_adapter(stopped / "stopped/default") == stopped / "stopped/default"
    assert _step(stopped / "stopped/default") == 2
    assert _step(resolve_adapter(stopped / "stopped")) == 4
    assert resolve_adapter(finished / "stopped") == finished / "adapters/default"


def test_an_earlier_state(finished, stopped):
    resolve_adapter(stopped)
    earlier = final_adapter(stopped, folder=resolve_adapter(stopped / "checkpoints/2").parent.name)
    later = final_adapter(finished)
    assert any((earlier[path] != leaf).any() for path, leaf in later.items())
    _require_equal(resolve_adapter(stopped), later)  # not the folder of step 2


def test_an_adapter_of_another_run_of_the_same_step_is_replaced(finished, stopped):
    folder = resolve_adapter(stopped)
    written = folder.stat().st_ino
    assert resolve_adapter(stopped).stat().st_ino == written  # not written again
    description = json.loads((folder / "adapter.json").read_text())
    description["checksums"] = dict.fromkeys(description["checksums"], 0)
    description["digest"] = content_digest({k: v for k, v in description.items() if k != "digest"})
    (folder / "adapter.json").write_text(json.dumps(description))
    _require_equal(resolve_adapter(stopped), final_adapter(finished))


def test_a_run_without_a_state(stopped):
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="has saved no training state yet"):
        resolve_adapter(stopped)


def test_an_adapter_that_the_run_does_not_have(stopped):
    with pytest.raises(CheckpointError, match="has no adapter 'other', but default"):
        resolve_adapter(stopped / "adapters" / "other")


def test_commands_take_a_stopped_run(stopped, capsys):
    assert (
        main(
            ["generate", "--adapter", str(stopped), "--prompt", "the fox", "--max-new-tokens", "2"]
        )
        == 0
    )
    assert main(["show", str(stopped)]) == 0
    shown, notes = capsys.readouterr()
    assert notes.count("adapter 'default' has not finished; taken at step 4") == 1
    assert "state    step 4 of 4" in shown
    assert "adapter  default: mixlora, not finished" in shown
    assert "default/loss" in shown
