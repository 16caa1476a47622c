"""A base that lies in a folder, known to be the one that an adapter belongs to."""

from pathlib import Path
from typing import NamedTuple

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import leaf_specs, require_same_leaves
from moe_jax.config.model import ModelConfig
from moe_jax.errors import CheckpointError
from moe_jax.hf.config import read_model_config
from moe_jax.hf.fingerprint import base_fingerprint
from moe_jax.hf.load import checked_leaves
from moe_jax.hf.resolve import resolve_checkpoint
from moe_jax.hf.shards import open_shards
from moe_jax.loaded.expected_leaves import expected_leaves


class BaseFolder(NamedTuple):
    """The base of an adapter.

    Attributes:
      folder: its checkpoint.
      model: its architecture.
    """

    folder: Path
    model: ModelConfig


def find_base(adapter: SavedAdapter, base: str) -> BaseFolder:
    """The base of an adapter, known to be the one that it was trained on.

    Args:
      adapter: whose leaves are checked too.
      base: its folder or hub id.

    Raises:
      CheckpointError: the base is missing, damaged, or another one; the adapter's weights are not
        those of its method.
    """
    folder = resolve_checkpoint(base)
    model = read_model_config(folder)
    if base_fingerprint(folder) != adapter.base.fingerprint:
        raise CheckpointError(
            f"{folder}: its weights differ from the base that the adapter was trained on "
            f"({adapter.base.path}); give that base"
        )
    expected = expected_leaves(model, adapter.method)
    require_same_leaves(leaf_specs(adapter.tree), expected, "its weights")
    with open_shards(folder) as shards:
        checked_leaves(shards, model)
    return BaseFolder(folder, model)
