"""Compiled programs kept on disk, so that no command compiles what an earlier one compiled."""

import os
import platform
import sys
import tempfile
import zlib
from pathlib import Path

import jax

MIN_SECONDS = 0.1
"""What compiles faster is not kept: reading it back takes about as long."""

MAX_BYTES = 2 * 2**30
"""Of the folder, when a command begins; JAX itself never removes anything from it."""


def keep_compiled_programs() -> None:
    """Turns on JAX's cache on disk. For commands, before anything is compiled; never on import.

    The folder is `JAX_COMPILATION_CACHE_DIR`, or else one of ours in the user's cache. JAX knows a
    program by its operations, its options, the devices and its own version, so that what comes out
    of a run is the same with the cache and without. `JAX_ENABLE_COMPILATION_CACHE=false` turns it
    off. Where the folder cannot be written, one line on stderr says so, and nothing is kept.
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
            f"compiled programs are not kept: cannot write {folder}: "
            f"{(error.strerror or str(error)).lower()}; give JAX_COMPILATION_CACHE_DIR another "
            "folder, or set JAX_ENABLE_COMPILATION_CACHE=false",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    if not chosen:
        prune(Path(folder), MAX_BYTES)


def default_folder() -> Path:
    """Below `XDG_CACHE_HOME`, or `~/.cache`; one for each kind of processor.

    A home may be shared by machines, and a program for a CPU uses instructions that another CPU
    need not have.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kind = f"{platform.machine()}-{zlib.crc32(_instructions().encode()):08x}"
    return Path(cache) / "moe_jax" / "compiled" / kind


def prune(folder: Path, max_bytes: int) -> None:
    """Removes the programs that were written first until the rest take at most `max_bytes`."""
    entries = []
    for file in folder.glob("*-cache"):  # the names that JAX gives them
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
    """What this machine's processor can do, in words that differ where that does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = ("flags", "Features", "model name")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(names)))
