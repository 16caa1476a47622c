"""`moe-jax serve`: flags, the log, signals and exit statuses."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest
from foreign_adapters import LORA
from hf_models import tiny_model
from inference.tokenizers_to_try import DEMO_BASE
from serving.server_process import server_process
from whole_models import adapter_of

import moe_jax
from moe_jax.checkpoints.adapter_files import save_adapter
from moe_jax.cli import main
from moe_jax.serving.load import open_models


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port: must be between 0 and 65535, got 70000"),
        (["--timeout", "0"], "--timeout: must be between 0.1 and 3600, got 0"),
        (["--api-key", ""], "--api-key: must be printable ASCII characters without spaces"),
        (["--api-key", "a b"], "--api-key: must be printable ASCII characters without spaces"),
        (["--allow-origin", "a.example"], "--allow-origin a.example: must be a scheme and a host"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: cannot listen there"),
        (["--max-rows", "0"], "--max-rows: must be positive, got 0"),
        (["--max-length", "257"], "--max-length: must be between 1 and the model's context of 256"),
        (["--cache-tokens", "9"], "--cache-tokens: 9 tokens do not hold one row"),
        (["--adapter", "base=nowhere"], "nowhere"),
        (["--adapter", "=nowhere"], "--adapter =nowhere: no name before '='; give NAME=DIR or DIR"),
    ],
)
def test_flags_are_checked_before_weights_are_read(flags, message, capsys, monkeypatch):
    monkeypatch.setattr("moe_jax.serving.load.load_params", None)
    port = [] if "--port" in flags or "--host" in flags else ["--port", "0"]
    assert main(["serve", "--base", str(DEMO_BASE), *port, *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_layers_of_several_kinds_are_refused(tmp_path, capsys):
    tiny_model("qwen3_5_text", num_hidden_layers=4).save_pretrained(tmp_path)
    assert main(["serve", "--base", str(tmp_path), "--port", "0"]) == 2
    assert "its layers are of several kinds" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "secret\n", "s\u00e9cret"])
def test_a_key_that_no_request_can_have(key, capsys, monkeypatch):
    monkeypatch.setenv("MOE_JAX_API_KEY", key)
    assert main(["serve", "--base", str(DEMO_BASE), "--port", "0"]) == 2
    assert "MOE_JAX_API_KEY: must be printable ASCII" in capsys.readouterr().err


def test_the_base_is_named_by_its_folder(monkeypatch):
    monkeypatch.chdir(DEMO_BASE)
    assert open_models(".", {}).name == "base"


def test_a_port_in_use(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["serve", "--base", str(DEMO_BASE), "--port", str(port)]) == 2
    assert f"--port {port}: cannot listen there (address already in use)" in capsys.readouterr().err


def test_without_the_extra():
    """In a process of its own, as modules that are imported twice would stay for other tests."""
    program = (
        "import sys; sys.modules['uvicorn'] = sys.modules['starlette.applications'] = None; "
        "from moe_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "serve", "--base", str(DEMO_BASE)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "is not installed; pip install 'moe-jax[serve]'" in result.stderr


@pytest.fixture
def process(folder, tmp_path_factory):
    """A server in a process of its own, its port, and the lines of its log."""
    adapter = tmp_path_factory.mktemp("adapter") / "tuned"
    save_adapter(adapter, adapter_of(moe_jax.load_base(folder), LORA))
    sizes = ["--max-rows", "1", "--max-length", "96", "--cache-tokens", "96"]
    with server_process(
        folder, "--adapter", str(adapter), *sizes, MOE_JAX_API_KEY="secret"
    ) as server:
        yield server


def ask(port, tokens, key="secret", n=1):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"model": "tuned", "prompt": "A fox", "max_tokens": tokens, "n": n, "stream": True}
    headers = {"Authorization": f"Bearer {key}"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection.getresponse()


def test_sigterm_completes_what_was_begun_and_refuses_the_rest(process):
    process, port, lines = process
    assert lines[0].startswith("cache: 96 tokens in blocks of 64 (0 MiB), at most 96 of each of 1")
    assert re.fullmatch(r"compiled \d+ programs in [\d.]+ s; requests compile none", lines[1])
    assert lines[2] == f"serving tiny, tuned on http://127.0.0.1:{port}"
    assert ask(port, 3, key="wrong").status == 401
    assert ask(port, 3).read().endswith(b"data: [DONE]\n\n")
    texts = []
    answers = [ask(port, 80) for _ in range(6)]  # one row: most of them wait for it
    readers = [
        threading.Thread(target=lambda a=answer: texts.append(a.read())) for answer in answers
    ]
    os.kill(process.pid, signal.SIGTERM)
    # The signal may arrive a moment later.
    assert 503 in (ask(port, 3).status for _ in range(100))
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(120)
    assert len(texts) == 6
    assert all(text.endswith(b"data: [DONE]\n\n") for text in texts)
    assert process.wait(60) == 0
    assert "Traceback" not in process.stderr.read()


def test_a_second_signal_ends_at_once(process):
    process, port, _ = process
    answers = [ask(port, 80, n=16) for _ in range(4)]
    assert answers[0].read(6) == b"data: "
    os.kill(process.pid, signal.SIGTERM)
    assert "a second signal ends at once" in process.stderr.readline()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0
    for answer in answers:
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            assert b"[DONE]" not in answer.read()
    assert "Traceback" not in process.stderr.read()
