"""Which configurations go on with the run of a work directory."""

import copy
import fcntl
import json
from pathlib import Path

import pytest

from configs.tiny_mixlora import get_config
from moe_jax.adapters import METHODS
from moe_jax.config.run import parse_run_config, to_json
from moe_jax.errors import ConfigError
from moe_jax.training.run.workdir import WorkDir, require_same_run


@pytest.fixture(scope="module")
def config():
    return parse_run_config(get_config().to_dict(), METHODS)


def test_a_run_of_an_earlier_version_goes_on_with_what_was_the_only_way_then(config):
    settings = json.loads(to_json(config))
    former = copy.deepcopy(settings)
    del former["compute"]["block_tokens"]
    del former["adapters"]["default"]["data"]["packing"]
    require_same_run(former, config, settings, Path("work"))

    settings["adapters"]["default"]["data"]["packing"] = "first_fit"
    with pytest.raises(ConfigError, match="packing was 'none', is 'first_fit'"):
        require_same_run(former, config, settings, Path("work"))


def test_a_field_that_there_is_no_more_is_another_run(config):
    settings = json.loads(to_json(config))
    former = {**settings, "compute": {**settings["compute"], "gone": 1}}
    with pytest.raises(ConfigError, match=r"config\.compute\.gone was 1, is absent"):
        require_same_run(former, config, settings, Path("work"))


def refuse(workdir):
    """A run that opens its folder and its file of metrics, and ends there."""
    with WorkDir(workdir) as work:
        (work.folder / "metrics.jsonl").touch()


def test_a_refused_run_leaves_no_folder_behind(tmp_path):
    refuse(tmp_path / "runs" / "first")
    assert not list(tmp_path.iterdir())

    (tmp_path / "runs").mkdir()
    refuse(tmp_path / "runs" / "first")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]


def test_what_was_there_before_or_was_written_stays(tmp_path):
    (tmp_path / "mine").mkdir()
    refuse(tmp_path / "mine")
    assert (tmp_path / "mine").exists()
    for text in ("{}", "more"):
        with WorkDir(tmp_path / "written") as work:
            (work.folder / "config.json").write_text(text)
        assert (tmp_path / "written" / "config.json").read_text() == text
    with WorkDir(tmp_path / "folder") as work:
        work.checkpoints.mkdir()
    assert (tmp_path / "folder" / "checkpoints").exists()


def test_a_folder_is_removed_by_the_run_that_has_its_lock_only(tmp_path):
    with WorkDir(tmp_path / "run"):
        with pytest.raises(ConfigError, match="another run is using"), WorkDir(tmp_path / "run"):
            pytest.fail("it was locked")
        assert (tmp_path / "run" / ".lock").exists()


def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path, monkeypatch):
    lock, first = fcntl.flock, WorkDir(tmp_path / "run")
    first.__enter__()

    def lock_late(file, operation):
        first.__exit__()
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with pytest.raises(ConfigError, match="another run is using"), WorkDir(tmp_path / "run"):
        pytest.fail("a third run would make the folder, and a lock of its own")
