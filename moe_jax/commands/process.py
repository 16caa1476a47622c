"""Set-up of a command's process: hooks, and the persistent cache of compiled programs."""

import logging
import os
import platform
import sys
import tempfile
import zlib
from pathlib import Path

import jax
import xxhash
from jax._src import compilation_cache, lru_cache

from moe_jax.checkpoints.late_errors import silence_late_errors
from moe_jax.files.cache import cache_folder
from moe_jax.terminal import print_shown

MIN_SECONDS = 0.1
"""Shortest compile time of a cached program; reading it back takes about as long."""

MAX_BYTES = 2 * 2**30
"""Largest size of the folder when a command starts; JAX itself never removes programs."""


_HASH_BYTES = 16


def set_up_process() -> None:
    """Installs the hooks and the cache. For commands, before anything is compiled."""
    silence_late_errors()
    logging.getLogger("jax._src.xla_bridge").addFilter(_plugin_error_in_one_line)
    keep_compiled_programs()


def _plugin_error_in_one_line(record: logging.LogRecord) -> bool:
    """Shows one line in place of jax's stack trace where the devices of a plugin are missing."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None or "plugin" not in str(record.msg):
        return True
    module = str(record.args[0]) if isinstance(record.args, tuple) and record.args else ""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    name = module.rpartition(".")[2]
    line = f"jax's plugin {name} does not start ({reason}); jax goes on without it"
    print_shown(line, file=sys.stderr)
    return False


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent cache of compiled programs.

    The folder is `JAX_COMPILATION_CACHE_DIR`, or `default_folder`. The key of a program contains
    its operations, its options, the devices and the version of JAX, so results are the same with
    and without the cache. In the default folder a damaged program is compiled again and replaced.
    `JAX_ENABLE_COMPILATION_CACHE=false` turns it off. If the folder is not
    writable, one line on stderr says so, and the cache is off.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = chosen or str(default_folder())
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if "://" in folder:  # a bucket, which JAX reaches by itself
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        jax.config.update("jax_enable_compilation_cache", False)
        print(
            f"compiled programs are not cached: cannot write {folder}: "
            f"{(error.strerror or str(error)).lower()}; give JAX_COMPILATION_CACHE_DIR another "
            "folder, or set JAX_ENABLE_COMPILATION_CACHE=false",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    if not chosen:
        prune(Path(folder), MAX_BYTES)
        compilation_cache.get_file_cache = _checked_cache


class _CheckedCache(lru_cache.LRUCache):
    """JAX's folder of programs, with a hash at the end of each, so that damage is seen.

    JAX itself warns of an entry that it cannot read, compiles, and keeps the entry. One that it can
    read may be another program.
    """

    def get(self, key: str) -> bytes | None:
        """The program of a key; None if there is none, or after removing a damaged one."""
        entry = super().get(key)
        if entry is None:
            return None
        program, checksum = entry[:-_HASH_BYTES], entry[-_HASH_BYTES:]
        if xxhash.xxh3_128_digest(program) == checksum:
            return program
        Path(self.path, f"{key}-cache").unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Adds a program."""
        super().put(key, value + xxhash.xxh3_128_digest(value))


def _checked_cache(path: str) -> tuple[_CheckedCache, str]:
    """Replaces `get_file_cache` of JAX, which has no setting for it."""
    max_size = jax.config.values["jax_compilation_cache_max_size"]
    return _CheckedCache(path, max_size=max_size), path


def default_folder() -> Path:
    """Folder in `XDG_CACHE_HOME` or `~/.cache`, one for each kind of processor.

    Several machines may share a home folder, and a compiled program may use instructions that
    another CPU lacks.
    """
    kind = f"{platform.machine()}-{zlib.crc32(_instructions().encode()):08x}"
    return cache_folder("compiled") / kind


def prune(folder: Path, max_bytes: int) -> None:
    """Removes the oldest programs until the rest take at most `max_bytes`."""
    entries = []
    for file in folder.glob("*-cache"):  # names that JAX gives to programs
        try:
            status = file.stat()
        except OSError:  # removed by another process
            continue
        entries.append((status.st_mtime, status.st_size, file))
    size = sum(entry[1] for entry in entries)
    for _, bytes_of_file, file in sorted(entries):
        if size <= max_bytes:
            return
        file.unlink(missing_ok=True)
        size -= bytes_of_file


def _instructions() -> str:
    """Description of the processor that differs if its instructions do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = ("flags", "Features", "model name")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))
