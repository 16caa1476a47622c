"""`moe-jax train` and `moe-jax plan` without a configuration file."""

import pytest
import tiny_run

from moe_jax.cli import main
from moe_jax.config.command_line import load_config_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_command")
    tiny_run.write_inputs(folder)
    return folder


def command(folder, workdir, *flags, name="train"):
    base, data = folder / "base", folder / "train.jsonl"
    arguments = [name, "--base", base, "--data", data, "--workdir", workdir, *flags]
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(folder):
    """A finished run of two steps."""
    workdir = folder / "run"
    assert command(folder, workdir, "--set", "training.steps=2") == 0
    return workdir


def test_settings_follow_from_base_and_data(folder, run):
    config = load_config_file(str(run / "config.py"))
    assert config["training"]["steps"] == 2
    assert config["training"]["epochs"] is None
    adapter = config["adapters"]["default"]
    # 2e-4 (4096 / 32)^0.78 = 8.80e-3, of two digits; half of the recipe's rank below width 1024.
    assert adapter["optimizer"]["learning_rate"] == 8.8e-3
    assert adapter["method"]["rank"] == 8
    rows = len((folder / "train.jsonl").read_text().splitlines())
    assert adapter["data"]["validation"]["held_out"]["split"] == f"train[-{rows // 20}:]"
    assert (run / "adapters" / "default").exists()


def test_the_written_file_continues_the_run(folder, run, capsys):
    assert main(["train", "--config", str(run / "config.py")]) == 0
    assert "already finished at step 2" in capsys.readouterr().out
    assert command(folder, run, "--set", "training.steps=2") == 0
    assert "already finished at step 2" in capsys.readouterr().out
    text = (run / "config.py").read_text()
    assert f"--data {folder / 'train.jsonl'}" in text
    assert "--set training.steps=2" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "lora"], "was made by another command"),
        (["--set", "training.steps"], "--set training.steps: expected FIELD=VALUE"),
    ],
)
def test_another_command_in_the_same_folder_is_refused(folder, run, capsys, flags, message):
    assert command(folder, run, *flags) == 2
    assert message in capsys.readouterr().err


def test_refusals(folder, tmp_path, capsys):
    assert command(folder, tmp_path / "a", "--set", "adapters.default.data.streaming=True") == 2
    assert "write a configuration file that streams" in capsys.readouterr().err
    assert main(["train", "--base", str(folder / "base")]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_plan(folder, tmp_path, capsys):
    assert command(folder, tmp_path / "a", name="plan") == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(line.startswith("adapter ") for line in lines)
    assert count == 1
    assert not (tmp_path / "a").exists()
