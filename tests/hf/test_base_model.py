"""Base models are located in folders and on the hub, a small server here, and fingerprinted."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.demo.tiny_llama import write_checkpoint
from moe_jax.errors import CheckpointError
from moe_jax.hf.base_content import base_fingerprint
from moe_jax.hf.base_model import open_base, resolve_checkpoint
from moe_jax.hf.config import read_model_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "model-00001-of-00002.safetensors": b"a shard",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"",
    "pytorch_model.bin": b"legacy",
    "consolidated.safetensors": b"a second copy",
    "original/consolidated.00.pth": b"a third copy",
    "original/model.safetensors": b"a fourth copy",
    "README.md": b"text",
}
DOWNLOADED = {name for name in FILES if "/" not in name} - {
    "pytorch_model.bin",
    "consolidated.safetensors",
    "README.md",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers the requests of the hub's protocol that download a snapshot."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[0] == "api"
        owner, name, kind, revision, *rest = [*parts[2 if api else 0 :], "", "", ""]
        rest = [part for part in rest if part]
        if name == "gated":
            return self.answer(403, X_Error_Code="GatedRepo")
        if (owner, name) != ("owner", "model"):
            return self.answer(404, X_Error_Code="RepoNotFound")
        if revision not in ("main", "v2", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if api and kind == "revision":
            siblings = [{"rfilename": file} for file in FILES]
            model = {"id": "owner/model", "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(model).encode())
        if api and kind == "tree":
            tree = [
                {"type": "file", "path": file, "size": len(body), "oid": "0" * 40}
                for file, body in FILES.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        body = FILES["/".join(rest)]
        return self.answer(200, body, ETag=f'"{"/".join(rest)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


# Run in a subprocess, since the hub's client reads its settings on import.
SCRIPT = """
import json, sys
from moe_jax.hf.base_model import resolve_checkpoint
from moe_jax.errors import CheckpointError
try:
    print(json.dumps({"folder": str(resolve_checkpoint(*json.loads(sys.argv[1])))}))
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


def resolve_in_process(endpoint: str, cache: Path, offline: bool, *arguments: str | None) -> dict:
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)],
        env=os.environ | settings,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Address of the server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_local_folder(tmp_path):
    assert resolve_checkpoint(tmp_path) == tmp_path
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_hub_model_is_downloaded_once_without_unused_files(hub, tmp_path):
    folder = Path(resolve_in_process(hub, tmp_path, False, "owner/model", "v2")["folder"])
    assert {path.name for path in folder.iterdir()} == DOWNLOADED
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    again = resolve_in_process(hub, tmp_path, True, "owner/model", COMMIT)
    assert again == {"folder": str(folder)}


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("owner/modle", None, r"owner/modle: no such folder, and as a hub id: .*no such model"),
        ("owner/gated", None, r"grants access on request"),
        ("owner/model", "v3", r"no revision 'v3'"),
        ("owner/mod--el", None, r"does not allow such a name"),
    ],
)
def test_hub_errors(hub, tmp_path, name: str, revision: str | None, message: str):
    error = resolve_in_process(hub, tmp_path, False, name, revision)["error"]
    assert re.search(message, error)
    assert "\n" not in error


@pytest.mark.parametrize("offline", [False, True])
def test_unreachable_hub(offline: bool, tmp_path):
    error = resolve_in_process("http://127.0.0.1:9", tmp_path, offline, "owner/model")["error"]
    assert re.search(r"cannot be reached.*hf download owner/model", error)


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("./llama", None, r"\./llama: no such folder; give a folder, or a hub id owner/name$"),
        ("/nowhere/llama", None, r"no such folder; give a folder, or a hub id owner/name$"),
        ("a/b/c", None, r"no such folder; give a folder, or a hub id owner/name$"),
        ("", None, r"path is empty"),
        ("{folder}", "v2", r"is a local folder, which has no revision 'v2'"),
        ("{folder}/config.json", None, r"is a file; give the folder"),
    ],
)
def test_invalid_local_paths(path: str, revision, message: str, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(path.format(folder=tmp_path), revision)


SMALL = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "num_hidden_layers": 2}


@pytest.fixture
def base(tmp_path):
    write_checkpoint(tmp_path / "base", seed=0, **SMALL)
    return tmp_path / "base"


def test_fingerprint_ignores_the_split_into_files(base, tmp_path):
    write_checkpoint(tmp_path / "shards", seed=0, shards=3, **SMALL)
    assert base_fingerprint(tmp_path / "shards") == base_fingerprint(base)


def test_fingerprint_of_other_weights(base, tmp_path):
    write_checkpoint(tmp_path / "other", seed=1, **SMALL)
    assert base_fingerprint(tmp_path / "other") != base_fingerprint(base)


def test_fingerprint_of_another_type(base, tmp_path):
    write_checkpoint(tmp_path / "half", seed=0, dtype="bfloat16", **SMALL)
    assert base_fingerprint(tmp_path / "half") != base_fingerprint(base)


def test_fingerprint_of_a_changed_tensor(base):
    before, file = base_fingerprint(base), base / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] + np.float32(1e-3)
    save_file(tensors, file)
    assert base_fingerprint(base) != before


def test_open_base(base):
    opened = open_base(base)
    assert opened.folder == base
    assert opened.identity == (str(base), base_fingerprint(base))
    assert opened.config == read_model_config(base)
    assert opened.params is None
    assert open_base(opened) is opened
