"""Work directories: configurations that resume a run, locks, and cleaning up."""

import copy
import fcntl
import json
import shutil
from pathlib import Path

import pytest

from configs.tiny_mixlora import get_config
from moe_jax.adapters import METHODS
from moe_jax.config.run import parse_run_config, to_json
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.training.run.workdir import WorkDir, require_same_run


@pytest.fixture(scope="module")
def config():
    return parse_run_config(get_config().to_dict(), METHODS)


def test_a_run_of_an_earlier_version_resumes_with_the_defaults_of_new_fields(config):
    settings = json.loads(to_json(config))
    former = copy.deepcopy(settings)
    del former["compute"]["remat"]
    del former["adapters"]["default"]["data"]["packing"]
    require_same_run(former, config, settings, Path("work"))

    settings["adapters"]["default"]["data"]["packing"] = "first_fit"
    with pytest.raises(ConfigError, match="packing was 'none', is 'first_fit'"):
        require_same_run(former, config, settings, Path("work"))


def test_a_removed_field_is_another_run(config):
    settings = json.loads(to_json(config))
    former = {**settings, "compute": {**settings["compute"], "gone": 1}}
    with pytest.raises(ConfigError, match=r"config\.compute\.gone was 1, is absent"):
        require_same_run(former, config, settings, Path("work"))


def open_and_leave(workdir):
    """Runs until the file of metrics is opened."""
    with WorkDir(workdir) as work:
        (work.folder / "metrics.jsonl").touch()


def test_an_invalid_run_leaves_no_folder(tmp_path):
    open_and_leave(tmp_path / "runs" / "first")
    assert not list(tmp_path.iterdir())

    (tmp_path / "runs").mkdir()
    open_and_leave(tmp_path / "runs" / "first")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_existing_folders_and_written_files_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    open_and_leave(tmp_path / "mine")
    assert (tmp_path / "mine").exists()
    for text in ("{}", "more"):
        with WorkDir(tmp_path / "written") as work:
            (work.folder / "config.json").write_text(text)
        assert (tmp_path / "written" / "config.json").read_text() == text
    with WorkDir(tmp_path / "folder") as work:
        work.checkpoints.mkdir()
    assert (tmp_path / "folder" / "checkpoints").exists()


def test_only_the_run_with_the_lock_removes_the_folder(tmp_path):
    with WorkDir(tmp_path / "run"):
        with pytest.raises(ConfigError, match="another run is using"), WorkDir(tmp_path / "run"):
            pytest.fail("it was locked")
        assert (tmp_path / "run" / ".lock").exists()


def test_a_removed_lock_is_not_taken(tmp_path, monkeypatch):
    lock, first = fcntl.flock, WorkDir(tmp_path / "run")
    first.__enter__()

    def lock_late(file, operation):
        first.__exit__(None, None, None)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with pytest.raises(ConfigError, match="another run is using"), WorkDir(tmp_path / "run"):
        pytest.fail("a third run would create the folder and another lock")


@pytest.mark.parametrize("change", ["removed", "renamed"])
def test_a_folder_that_another_run_has_made_again_is_left_alone(tmp_path, change):
    folder = tmp_path / "run"
    first = WorkDir(folder)
    first.__enter__()
    first.claim()
    if change == "removed":
        shutil.rmtree(folder)
    else:
        folder.rename(tmp_path / "other")
    with WorkDir(folder) as second:
        second.claim()
        with pytest.raises(CheckpointError, match="was removed or renamed"):
            first.require_in_place()
        first.__exit__(None, None, None)
        second.require_in_place()
        with pytest.raises(ConfigError, match="another run is using"), WorkDir(folder):
            pytest.fail("the first run has removed the lock of the second")


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced"])
def test_a_folder_that_is_gone_is_named_whatever_the_error_is(tmp_path, change):
    folder = tmp_path / "run"

    def change_in_use():
        with WorkDir(folder) as work:
            (folder / "config.json").write_text("{}")
            work.require_in_place()
            if change == "removed":
                shutil.rmtree(folder)
            else:
                folder.rename(tmp_path / "other")
            if change == "replaced":
                folder.mkdir()
            with pytest.raises(CheckpointError, match="was removed or renamed"):
                work.require_in_place()
            raise ValueError("of a library that writes checkpoints")

    with pytest.raises(CheckpointError) as error:
        change_in_use()
    assert str(error.value) == (
        f"{folder} was removed or renamed while the run used it (its .lock is gone, or another "
        "run's); put it back and run the same command again, or give another --workdir"
    )


def test_other_errors_and_signals_stay(tmp_path):
    def leave(error, remove):
        with WorkDir(tmp_path / "run") as work:
            if remove:
                shutil.rmtree(work.folder)
            raise error

    with pytest.raises(ValueError, match="other"):
        leave(ValueError("other"), remove=False)
    with pytest.raises(KeyboardInterrupt):
        leave(KeyboardInterrupt(), remove=True)
