"""Folder for what can be made again: compiled programs, and hashes of base models."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Path of `moe_jax/NAME` in `XDG_CACHE_HOME` or `~/.cache`; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_jax" / name
