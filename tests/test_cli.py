"""`moe-jax` as a command: export, import, signals and errors of one line."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
from foreign_adapters import LORA, MIXLORA, random_adapter, require_same_bits
from hf_models import save_tiny_llama
from tiny_run import fork_server

import moe_jax
from moe_jax.adapters.routing.router import ROUTERS
from moe_jax.checkpoints.adapter_files import save_adapter
from moe_jax.cli import COMMANDS, main
from moe_jax.commands import arguments as choices
from moe_jax.exchange import FORMATS
from moe_jax.exchange import api as exchange
from moe_jax.exchange.format import Weighting as ExportWeighting
from moe_jax.hf.config import read_model_config
from moe_jax.surgery.grow import DEFAULT_NOISE
from moe_jax.surgery.merge import Weighting
from moe_jax.surgery.upcycle import UPCYCLED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and two adapters of it in our format; read-only."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_llama(folder / "base")
    model = read_model_config(folder / "base")
    for name, method in (("lora", LORA), ("mixlora", {**MIXLORA, "dropout": 0.1})):
        adapter = random_adapter(method, model, str(folder / "base"))
        save_adapter(folder / name, adapter)
    return folder


def test_export_and_import(folder, tmp_path, capsys):
    out, back = tmp_path / "out", tmp_path / "adapters"
    arguments = ["--adapter", folder / "mixlora", "--to", "mixlora", "--output", out]
    assert main(["export", *map(str, arguments), "--base", str(folder / "base")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "note: left out, relevant for further training only: dropout",
        f"wrote {out} (mixlora)",
    ]
    arguments = ["--from", out, "--base", folder / "base", "--output", back, "--name", "mine"]
    assert main(["import", *map(str, arguments)]) == 0
    assert capsys.readouterr().out == f"wrote {back / 'mine'} (mixlora)\n"
    imported = moe_jax.load_adapter(back / "mine")
    require_same_bits(imported, moe_jax.load_adapter(folder / "mixlora"))
    assert imported.base == moe_jax.load_base(folder / "base").identity
    assert imported.step == 0
    assert main(["show", str(back / "mine")]) == 0
    assert "num_experts = 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "words", "status"), [(signal.SIGINT, "stopped\n", 130), (signal.SIGTERM, "", 143)]
)
def test_a_signal_leaves_no_files(folder, tmp_path, capsys, monkeypatch, number, words, status):
    def interrupted(*_):
        assert len(list(tmp_path.iterdir())) == 1  # the beginning of an export
        os.kill(os.getpid(), number)

    monkeypatch.setattr(exchange, "model_card", interrupted)
    arguments = ["--adapter", folder / "lora", "--to", "peft", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["export", *map(str, arguments)]))
    assert ended.value.code == status
    size = f"writing {tmp_path / 'out'}: peft, float32, up to 0.2 MB\n"
    assert capsys.readouterr().err == size + words
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_ends_the_process_while_it_cleans_up():
    process = fork_server().Process(target=_interrupted_twice)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGINT


def _interrupted_twice():
    def run(_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)

    COMMANDS["show"] = lambda _: run
    main(["show"], own_process=True)


def test_a_signal_in_a_callback_of_the_garbage_collector_stops_too(monkeypatch):
    def _xla_gc_callback():  # Python drops what jax's callback raises
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)  # the handler runs here at the latest

    def run(_):
        _xla_gc_callback()
        time.sleep(60)
        pytest.fail("the signal was lost")

    monkeypatch.setitem(COMMANDS, "show", lambda _: run)
    assert main(["show"]) == 130


def test_errors_are_one_line(folder, tmp_path, capsys):
    for arguments, words in (
        (["export", "--adapter", folder / "mixlora", "--to", "peft"], "cannot express method"),
        (["export", "--adapter", tmp_path, "--to", "peft"], "no adapter here, adapter.json is"),
        (["import", "--from", tmp_path, "--base", folder / "base"], "adapter_config.json is miss"),
    ):
        assert main([*map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert words in captured.err
        assert len(captured.err.splitlines()) == 1
        assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("export", ["--adapter", "--to {", "mixlora ", "peft ", "--dtype", "--base", "is empty"]),
        ("import", ["--from", "--base", "--output", "--name", "no code in it is run"]),
    ],
)
def test_help(capsys, command, words):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words), shown


def test_choices_equal_the_registries():
    assert list(choices.EXPORT_FORMATS) == sorted(FORMATS)
    assert get_args(ExportWeighting) == choices.EXPORT_WEIGHTS
    # Other tests register routers from outside, which commands do not offer.
    ours = [name for name in ROUTERS if ROUTERS[name].__module__.startswith("moe_jax.")]
    assert list(choices.ROUTERS) == sorted(ours)
    assert moe_jax.TARGET_MODULES == choices.TARGETS
    assert UPCYCLED == choices.UPCYCLE_TO
    assert DEFAULT_NOISE == choices.GROW_NOISE
    assert get_args(Weighting) == choices.MERGE_WEIGHTS


def test_help_imports_no_heavy_packages():
    code = (
        "import sys, moe_jax.cli\n"
        "try: moe_jax.cli.main(['evaluate', '--help'])\n"
        "finally: print(sorted({'jax', 'flax', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_as_a_process(folder, tmp_path):
    arguments = ["export", "--adapter", folder / "mixlora", "--to", "peft", "--output", tmp_path]
    command = [sys.executable, "-m", "moe_jax", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the peft format cannot express method 'mixlora'; ")
    assert len(ended.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "start",
    [
        "threading.Thread(target=threading.Event().wait).start()",
        "futures.ThreadPoolExecutor(1).submit(threading.Event().wait)",
    ],
)
def test_threads_that_wait_for_ever_do_not_keep_a_failed_command(start):
    code = (
        "import sys, threading; from concurrent import futures\n"
        "from moe_jax import cli; from moe_jax.errors import UserError\n"
        "cli.LINGER = 0.1\n"
        "def run(_):\n"
        f"    {start}\n"
        "    raise UserError('the disk is read-only')\n"
        "cli.COMMANDS['show'] = lambda _: run\n"
        "sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", code, "show"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (2, "error: the disk is read-only\n")


def test_a_closed_pipe_is_not_an_error(folder):
    code = "import sys; from moe_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "show", str(folder / "lora")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()  # as `head` does, before the first line is written
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("command", "function", "arguments"),
    [
        ("generate", "moe_jax.commands.generate.generate", ["--prompt", "a"]),
        ("evaluate", "moe_jax.evaluation.model_evaluation.evaluate", ["--tasks", "boolq"]),
        (
            "inspect",
            "moe_jax.inspection.routing_inspection.inspect_routing",
            ["--text", "a", "--output", "o"],
        ),
    ],
)
def test_out_of_memory(command, function, arguments, folder, capsys, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(function, fail)
    assert main([command, "--adapter", str(folder / "mixlora"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: try a smaller --batch-size")
    assert error.count("\n") == 1
