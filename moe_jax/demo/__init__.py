"""The demo: a tiny Llama with its data, which tests and notebooks use too.

Names are imported at their first use, as in `moe_jax`.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names of `_MODULES`, for type checkers
    from moe_jax.demo.corpus import TASKS as TASKS
    from moe_jax.demo.corpus import write_corpus as write_corpus
    from moe_jax.demo.score import HeldOutScorer as HeldOutScorer
    from moe_jax.demo.tiny_mixlora import get_config as get_config

BASE = Path(__file__).parent / "base"
"""Folder of the tiny Llama, in the Hugging Face format."""

_MODULES = {
    "HeldOutScorer": "score",
    "TASKS": "corpus",
    "get_config": "tiny_mixlora",
    "write_corpus": "corpus",
}

__all__ = ["BASE", "TASKS", "HeldOutScorer", "get_config", "write_corpus"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'moe_jax.demo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moe_jax.demo.{_MODULES[name]}"), name)
