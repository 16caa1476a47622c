"""Bases with adapters to be made one model."""

from pathlib import Path
from typing import Any

import torch
from foreign_adapters import random_adapter
from hf_models import tiny_model
from safetensors.torch import load_file

import moe_jax
from moe_jax.checkpoints.adapter_files import SavedAdapter


def saved_base(folder: Path, model_type: str, **overrides: Any) -> moe_jax.Base:
    """A tiny base, in `folder` and in memory."""
    tiny_model(model_type, **overrides).save_pretrained(folder)
    return moe_jax.load_base(folder)


def adapter_of(base: moe_jax.Base, method: dict[str, Any], spread: float = 0.1) -> SavedAdapter:
    """An adapter with large weights that was trained on this base."""
    adapter = random_adapter(method, base.config, str(base.folder), spread=spread)
    return adapter._replace(base=base.identity)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
