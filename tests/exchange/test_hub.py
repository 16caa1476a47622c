"""Uploads of exports to the hub and downloads from it, against a small server in this process.

The client is `huggingface_hub`, over HTTP, with its fast transfer switched off, so that large files
are sent as Git LFS objects.
"""

import base64
import hashlib
import http.server
import json
import threading
from typing import Any, ClassVar

import pytest
from foreign_adapters import LORA, random_adapter, require_same_bits
from hf_models import save_tiny_llama

import moe_jax
from moe_jax.checkpoints.adapter_files import save_adapter
from moe_jax.cli import main
from moe_jax.errors import CheckpointError
from moe_jax.exchange.hub import HubTarget, push_folder, require_access
from moe_jax.hf.config import read_model_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {"write": "write", "read": "read", "fine": "fineGrained"}


class Hub(http.server.BaseHTTPRequestHandler):
    """The endpoints that create a repository, upload to it and download from it.

    Every token of `TOKENS` belongs to the user `me`. `me/public` exists at the beginning;
    `me/refused` and `me/broken` reject commits.
    """

    repositories: ClassVar[dict[str, dict[str, Any]]] = {}
    objects: ClassVar[dict[str, bytes]] = {}
    log: ClassVar[list[str]] = []

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "/api/whoami-v2":
            if token not in TOKENS:
                return self.answer(401, {"error": "Invalid credentials"})
            orgs = [{"name": "team", "roleInOrg": "read"}, {"name": "club", "roleInOrg": "write"}]
            auth = {"accessToken": {"role": TOKENS[token]}}
            return self.answer(200, {"name": "me", "type": "user", "orgs": orgs, "auth": auth})
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository = self.repositories.get("/".join(parts[:2]))
        if repository is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        files = repository["files"]
        if api and parts[2:3] == ["tree"]:
            tree = [
                {"type": "file", "path": file, "size": len(body), "oid": "0" * 40}
                for file, body in files.items()
            ]
            return self.answer(200, tree)
        if api:
            siblings = [{"rfilename": file} for file in files]
            stated = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings}
            return self.answer(200, {**stated, "private": repository["private"]})
        body = files["/".join(parts[4:])]
        etag = hashlib.sha256(body).hexdigest()
        return self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        self.log.append(path)
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            url = f"http://{self.headers['Host']}/{name}"
            if name in self.repositories:
                return self.answer(409, {"error": "You already created this model repo"})
            private = request.get("private") or request.get("visibility") == "private"
            self.repositories[name] = {"files": {}, "private": bool(private)}
            return self.answer(200, {"url": url})
        if path.endswith("/info/lfs/objects/batch"):
            host = f"http://{self.headers['Host']}/objects"
            objects = [
                {**item, "actions": {"upload": {"href": f"{host}/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        parts = path.removeprefix("/api/models/").split("/")
        name, action = "/".join(parts[:2]), parts[2]
        if action == "branch":
            self.repositories[name].setdefault("branches", []).append(parts[3])
            return self.answer(200, {})
        if action == "preupload":
            files = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for item in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        assert action == "commit", path
        if name == "me/refused":
            return self.answer(403, {"error": "Forbidden: over your quota"})
        if name == "me/broken":
            return self.answer(400, {"error": "out of order"})
        repository = self.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository["summary"], repository["revision"] = value["summary"], parts[3]
            elif line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                repository["files"][value["path"]] = self.objects[value["oid"]]
        url = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
        return self.answer(200, {"success": True, "commitUrl": url, "commitOid": COMMIT})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return self.answer(200)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, with the hub's client of this process logged in to it."""

    monkeypatch.setattr(Hub, "repositories", {"me/public": {"files": {}, "private": False}})
    monkeypatch.setattr(Hub, "objects", {})
    monkeypatch.setattr(Hub, "log", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "write")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Read-only folder with a base and an adapter of it."""
    folder = tmp_path_factory.mktemp("pushed")
    save_tiny_llama(folder / "base")
    model = read_model_config(folder / "base")
    adapter = random_adapter(LORA, model, str(folder / "base"))
    save_adapter(folder / "adapter", adapter._replace(pictures={"loss.png": b"\x89PNG..."}))
    return folder


def export(folder, out, *options, to="peft"):
    paths = ["--adapter", folder / "adapter", "--to", to, "--output", out]
    return main(["export", *map(str, (*paths, *options))])


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_an_export_is_pushed(hub, folder, tmp_path, capsys):
    options = ["--push-to-hub", "me/mine", "--private", "--commit-message", "the first one"]
    assert export(folder, tmp_path / "out", *options, "--revision", "wip") == 0
    first, pushed, wrote = capsys.readouterr().out.splitlines()[-3:]
    assert f"note: it names the base by the folder {folder / 'base'}, which others" in first
    assert pushed.startswith("note: pushed to http://127.0.0.1:")
    assert pushed.endswith("/me/mine")
    assert wrote == f"wrote {tmp_path / 'out'} (peft)"
    mine = hub.repositories["me/mine"]
    assert mine.pop("files") == contents(tmp_path / "out")
    assert mine == {
        "private": True,
        "summary": "the first one",
        "revision": "wip",
        "branches": ["wip"],
    }
    assert hub.objects.keys() == {
        hashlib.sha256((tmp_path / "out" / "adapter_model.safetensors").read_bytes()).hexdigest()
    }


def test_adapters_are_read_from_the_hub(hub, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for to in ("peft", "moe_jax"):
        base = ["--base", "some/base"]
        assert export(folder, to, *base, "--push-to-hub", f"me/{to}", to=to) == 0
        assert "which others do not have" not in capsys.readouterr().out
        card = (tmp_path / to / "README.md").read_text()
        assert 'base_model: "some/base"' in card
        assert f'"me/{to}")' in card  # in the lines that load it
    expected = moe_jax.load_adapter(folder / "adapter")
    downloaded = moe_jax.load_adapter("me/moe_jax")
    require_same_bits(downloaded, expected)
    assert downloaded.base == expected.base._replace(path="some/base")
    assert downloaded.pictures == expected.pictures
    require_same_bits(moe_jax.import_adapter("me/peft", folder / "base"), expected)
    with pytest.raises(CheckpointError, match=r"of another tool; convert it with `moe-jax import"):
        moe_jax.load_adapter("me/peft")
    with pytest.raises(CheckpointError, match=r"me/nothing: no such folder, and as a hub id: the "):
        moe_jax.load_adapter("me/nothing")


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("mine", "write", "'mine' is not a repository name; give OWNER/NAME"),
        ("me/a/b", "write", "'me/a/b' is not a repository name; give OWNER/NAME"),
        ("me/my adapter", "write", "'me/my adapter' is not a repository name"),
        ("me/a--b", "write", "'me/a--b' is not a repository name"),
        (
            "you/mine",
            "write",
            "'me', which is not a member of 'you'; give one of me, team, club",
        ),
        ("me/mine", "read", "me/mine: you have read access only; log in with `hf auth"),
        ("team/mine", "write", "team/mine: you have read access only"),
        ("me/mine", "old", "your token is invalid; log in again with `hf auth login`"),
        ("me/mine", None, "not logged in to the hub; run `hf auth login`"),
        ("me/public", "write", "already exists and is public; make it private on its page"),
    ],
)
def test_refusals_before_anything_is_written(
    hub, folder, tmp_path, monkeypatch, capsys, name, token, words
):
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert export(folder, tmp_path / "out", "--push-to-hub", name, "--private") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: push to hub: ")
    assert len(error.splitlines()) == 1
    assert words in error
    assert not (tmp_path / "out").exists()
    assert hub.log == []


@pytest.mark.parametrize(("owner", "token"), [("club", "write"), ("me", "fine")])
def test_write_access(hub, monkeypatch, owner, token):
    monkeypatch.setenv("HF_TOKEN", token)
    require_access(HubTarget(f"{owner}/mine", private=True))
    require_access(HubTarget("me/public"))
    assert hub.log == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refused", "no write access; log in with `hf auth login`"),
        ("broken", "the hub answered 400"),
    ],
)
def test_a_failed_push_keeps_the_export(hub, folder, tmp_path, capsys, name, words):
    out, branch = tmp_path / "out", ["--revision", "wip"]
    assert export(folder, out, "--push-to-hub", f"me/{name}", "--private", *branch) == 2
    captured = capsys.readouterr()
    (error,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert f"{out} is complete, but pushing it to me/{name} failed: {words}" in error
    command = f"push it with `hf upload me/{name} {out} . --private --revision wip`"
    assert error.endswith(command)
    assert (
        moe_jax.import_adapter(out, folder / "base").method
        == moe_jax.load_adapter(folder / "adapter").method
    )


def test_without_a_network(hub, tmp_path, monkeypatch):
    target = HubTarget("me/mine")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"me/mine: the hub cannot be reached \("):
        require_access(target)
    with pytest.raises(
        CheckpointError, match=r"complete, but .*: the hub cannot be .*push it with"
    ):
        push_folder(tmp_path, target)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set; unset it"):
        require_access(target)


def test_options_without_a_push(folder, tmp_path, capsys):
    assert export(folder, tmp_path / "out", "--private") == 2
    assert "--private: has no effect without --push-to-hub; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
