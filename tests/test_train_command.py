"""`train.py` as a command: exit status and errors of one line, without a traceback."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
from tiny_run import fork_server, write_inputs
from xla_flags import xla_flags

from moe_jax.cli import main
from moe_jax.config.command_line import load_config_file
from moe_jax.training.run import start_up

TRAIN = Path(__file__).parents[1] / "train.py"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def start(*arguments, devices=1, folder=None):
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(devices),
        "JAX_COMPILATION_CACHE_DIR": str(Path(os.environ["HF_HOME"]).with_name("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )


def finish(process):
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err
    return process.returncode, out, err


def _as_main(arguments, out, err):
    os.environ["XLA_FLAGS"] = xla_flags(devices=1)
    sys.argv = [str(TRAIN), *arguments]
    with out.open("w") as sys.stdout, err.open("w") as sys.stderr:
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except Exception:
            traceback.print_exc()
            raise


def refusal(*arguments):
    """Error line of a command that must exit with status 2.

    It runs in a process that has imported the libraries already.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = fork_server().Process(target=_as_main, args=([*map(str, arguments)], out, err))
        process.start()
        process.join(300)
        return only_line(process.exitcode, err.read_text())


def only_line(status, err):
    """Error line on the stderr of a command that exited with status 2."""
    assert "Traceback" not in err
    assert status == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert err.rstrip("\n").endswith(lines[0]), err
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--base is missing; give --config FILE"),
        (["--base=b"], "--data is missing; give --config FILE"),
        (["--config=CONFIG", "--method=lora"], "--method: the file of --config sets it"),
        (["--config=CONFIG", "--column=a=b"], "--column: the file of --config sets it"),
        (["--base=b", "--data=d", "--column=a"], "--column a: give FIELD=NAME"),
        (["--base=b", "--data=d", "--column==a"], "--column =a: give FIELD=NAME"),
        (
            ["--base=b", "--data=d", "--column=text=a", "--column=text=b"],
            "--column text=b: 'text' already has the column 'a'",
        ),
        (["--config=CONFIG", "--set=training"], "--set training: expected FIELD=VALUE"),
        (["--config=nowhere.py", "--workdir=w"], "--config: no such file: nowhere.py"),
        (["--confg=CONFIG"], "unknown flag --confg; did you mean '--config'?"),
        (["CONFIG", "--workdir=w"], "unexpected argument"),
        (["--config=CONFIG", "--workdir=w", "--devices=8"], "--devices goes with a plan only"),
        (["--config=CONFIG", "--compile-for=h200"], "--compile-for goes with a plan only; add"),
        (["--config=CONFIG", "--plan", "--compile-for=h20"], "--compile-for: no chip is called"),
        (["--config=CONFIG", "--plan", "--devices=0"], "devices"),
        (
            ["--config=CONFIG", "--workdir=w", "--config.adapters.default.method.rnk=8"],
            "config.adapters.default.method.rnk: unknown field; did you mean 'rank'?",
        ),
        (
            ["--config=CONFIG", "--workdir=w", "--config.adapters.default.method.rank=x"],
            "config.adapters.default.method.rank: expected a number, 'match:NAME' with the name of",
        ),
        (
            ["--config=CONFIG", "--workdir=w", "--config.adapters.default.method.name=mixlra"],
            "config.adapters.default.method.name: unknown method 'mixlra'; did you mean 'mixlora'?",
        ),
        (
            ["--config=CONFIG", "--plan", "--config.base.path=some/model"],
            "config.base.hf_config: a plan needs it, since some/model is not a local folder",
        ),
    ],
)
def test_invalid_command_lines(inputs, arguments, words):
    assert words in refusal(*[argument.replace("CONFIG", str(inputs)) for argument in arguments])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("base.path", "/nowhere", "config.base.path: /nowhere: no such folder; give a folder"),
        ("mesh.data", 3, "mesh data=3 x fsdp=1 x tensor=1 needs 3 devices, but 1 (cpu)"),
        ("base.hf_config", {"model_type": "llama"}, "config.base.hf_config"),
        (
            "adapters.default.data.train.words.path",
            "/nowhere.jsonl",
            "config.adapters.default.data.train.words: /nowhere.jsonl: no such file or folder",
        ),
    ],
)
def test_invalid_inputs(inputs, tmp_path, field, value, words):
    error = refusal(
        f"--config={inputs}", f"--workdir={tmp_path / 'run'}", f"--config.{field}={value}"
    )
    assert words in error
    assert not (tmp_path / "run").exists(), "found before the long work"


def test_a_truncated_base(inputs, tmp_path):
    folder = write_inputs(tmp_path / "inputs").parent
    weights = folder / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    error = refusal(f"--config={folder / 'config.py'}", f"--workdir={tmp_path / 'run'}")
    assert "model.safetensors" in error
    assert "truncated or damaged" in error
    assert not (tmp_path / "run").exists()


def test_plan_needs_neither_weights_nor_data(inputs, tmp_path):
    folder = write_inputs(tmp_path / "inputs").parent
    (folder / "base" / "model.safetensors").unlink()
    (folder / "train.jsonl").unlink()
    status, out, err = finish(start(f"--config={folder / 'config.py'}", "--plan", "--devices=4"))
    assert status == 0, err
    assert "data=4 x fsdp=1 x tensor=1" in out
    assert "25,120 parameters" in out
    assert "9,728 parameters" in out


def test_the_work_directory_has_the_name_of_the_configuration(inputs, tmp_path):
    short = ["--config.training.steps=3", "--config.adapters.default.data.buckets=()"]
    status, out, err = finish(start(f"--config={inputs}", *short, folder=tmp_path))
    assert status == 0, err
    assert "runs/config" in out
    status, again, err = finish(start(f"--config={inputs}", *short, folder=tmp_path))
    assert status == 0, err
    assert "already finished at step 3; its adapters are in" in again
    assert again.rstrip().endswith("give another --workdir to train again")


def test_a_run_without_a_configuration_file(inputs, tmp_path):
    base, data = inputs.parent / "base", inputs.parent / "train.jsonl"
    command = [f"--base={base}", f"--data={data}", "--schema=completion", "--set=training.steps=2"]
    status, out, err = finish(start(*command, "--set=training.epochs=None", folder=tmp_path))
    assert status == 0, err
    work = tmp_path / "runs" / "base-mixlora-train"
    assert (work / "adapters" / "default" / "adapter.json").is_file()
    config = load_config_file(str(work / "config.py"))
    assert config["adapters"]["default"]["data"]["train"]["train"]["path"] == str(data)
    # The file describes the same run.
    file = [f"--config={work / 'config.py'}", "--config.training.steps=2"]
    status, out, err = finish(start(*file, "--config.training.epochs=None", folder=tmp_path))
    assert status == 0, err
    assert "already finished at step 2" in out
    error = only_line(
        *_status_and_error(finish(start(*command, "--method=lora", f"--workdir={work}")))
    )
    assert "config.py was made by another command" in error


def _status_and_error(finished):
    status, _, err = finished
    return status, err


def test_a_damaged_state_leaves_no_traceback(inputs, tmp_path):
    command = [f"--config={inputs}", f"--workdir={tmp_path / 'run'}"]
    short = ["--config.training.steps=3", "--config.adapters.default.data.buckets=()"]
    status, out, err = finish(start(*command, *short))
    assert status == 0, err
    assert "adapter 'default' finished at step 3; it is in" in out
    (tmp_path / "run" / "adapters").rename(tmp_path / "gone")
    for file in (tmp_path / "run/checkpoints/3/adapters/ocdbt.process_0/d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    status, _, err = finish(start(*command, *short))
    error = only_line(status, err)
    assert "checkpoints/3 is damaged (adapters/ocdbt.process_0/d/" in error
    assert "and no earlier state is intact; copy it from a backup, or delete" in error


def test_ctrl_c_saves(inputs, tmp_path):
    short = ["--config.training.steps=3000", "--config.adapters.default.data.buckets=()"]
    process = start(f"--config={inputs}", f"--workdir={tmp_path / 'run'}", *short)
    assert process.stdout is not None
    for line in process.stdout:
        if " grad " in line:
            break
    process.send_signal(2)
    status, out, err = finish(process)
    assert status == 130
    assert "SIGINT: stopping after this step" in err
    assert "run the same command to resume" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_says_that_nothing_is_saved(
    inputs, tmp_path, monkeypatch, capsys, number
):
    def signalled(*_):  # while the step compiles
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(start_up, "start_up_table", signalled)
    arguments = ["train", f"--config={inputs}", f"--workdir={tmp_path / 'run'}"]
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 143
    else:
        assert main(arguments) == 130
    out = capsys.readouterr().out
    assert out.endswith("stopped before a step was made; nothing is saved\n")
    assert not (tmp_path / "run").exists()
