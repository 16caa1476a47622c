"""Persistent cache of compiled programs: default, settings of the user, errors, pruning."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import xxhash
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from moe_jax.commands import process
from moe_jax.commands.process import default_folder, keep_compiled_programs, prune

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    """An environment without settings; restores the configuration of JAX."""
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    former = {name: jax.config.values[name] for name in SETTINGS}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setattr(process.compilation_cache, "get_file_cache", None)
    yield
    for name, value in former.items():
        jax.config.update(name, value)
    reset_cache()


def settings():
    return tuple(jax.config.values[name] for name in SETTINGS)


def test_the_cache_is_on_by_default(tmp_path, capfd):
    keep_compiled_programs()
    folder, enabled, seconds = settings()
    assert folder == str(default_folder())
    assert default_folder().parent == tmp_path / "cache" / "moe_jax" / "compiled"
    assert default_folder().is_dir()
    assert (enabled, seconds) == (True, 0.1)
    assert capfd.readouterr() == ("", "")


def test_another_processor_has_another_folder(monkeypatch):
    here = default_folder()
    assert default_folder() == here
    monkeypatch.setattr(process, "_instructions", lambda: "flags : fpu vme")
    assert default_folder() != here


def test_settings_of_the_user_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update(SETTINGS[2], 7.0)  # as JAX itself does on import
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "program-cache").write_bytes(b"0")
    monkeypatch.setattr(process, "MAX_BYTES", 0)
    keep_compiled_programs()
    assert settings() == (str(tmp_path / "own"), True, 7.0)
    assert (tmp_path / "own" / "program-cache").exists()


def test_the_cache_can_be_turned_off(tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)  # JAX_ENABLE_COMPILATION_CACHE=false
    before = settings()
    keep_compiled_programs()
    assert settings() == before
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_not_writable(tmp_path, capfd):
    (tmp_path / "cache").write_text("a file")
    keep_compiled_programs()
    assert not jax.config.values["jax_enable_compilation_cache"]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"compiled programs are not cached: cannot write {default_folder()}: ")


def test_the_oldest_programs_are_removed(tmp_path):
    for age, name in enumerate(("new-cache", "old-cache", "oldest-cache", "oldest-but-not-ours")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    prune(tmp_path, 200)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "new-cache",
        "old-cache",
        "oldest-but-not-ours",
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_program_is_replaced(damage, monkeypatch, recwarn):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    keep_compiled_programs()
    reset_cache()

    def run():
        jax.clear_caches()
        return float(jax.jit(lambda x: jnp.sin(x) * 3)(jnp.float32(2.0)))

    expected = run()
    entries = {file: file.read_bytes() for file in default_folder().glob("*-cache")}
    assert entries
    for file, content in entries.items():
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"flip": flipped, "cut": content[:middle], "empty": b""}[damage])

    assert run() == expected
    for file in entries:
        content = file.read_bytes()
        assert xxhash.xxh3_128_digest(content[:-16]) == content[-16:], file
    monkeypatch.setattr(process._CheckedCache, "put", None)  # would warn
    assert run() == expected
    assert not [warning for warning in recwarn if "cache" in str(warning.message)]


def test_a_plugin_without_its_devices_is_one_line(tmp_path):
    # As jax's plugins for CUDA do on a machine without a GPU.
    plugin = tmp_path / "jax_plugins" / "xla_absent"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(
        "def initialize():\n    raise RuntimeError('Unable to load cuPTI.\\nIs it installed?')\n"
    )
    code = (
        "from moe_jax.commands.process import set_up_process\n"
        "set_up_process()\n"
        "import jax\n"
        "print(jax.default_backend())"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    line = "jax's plugin xla_absent does not start (Unable to load cuPTI.); jax goes on without it"
    assert [each for each in done.stderr.splitlines() if "xla_absent" in each] == [line]
    assert "Traceback" not in done.stderr
