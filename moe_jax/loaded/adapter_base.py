"""Which leaves an adapter has, without making any."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.adapters.method import AdapterMethod
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import LeafSpec, leaf_specs, require_same_leaves
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.errors import CheckpointError
from moe_jax.hf.base_model import base_fingerprint, resolve_checkpoint
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import checked_leaves
from moe_jax.hf.shards import open_shards
from moe_jax.layers.names import PARAMS
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.models.fresh import fresh_adapter


def expected_leaves(model: ModelConfig, method: AdapterMethod) -> dict[str, LeafSpec]:
    """Shape and type of every leaf of an adapter of `method` on a base of this architecture.

    Nothing is computed, nor compiled: the model is traced with shapes alone.
    """
    language_model = LlamaForCausalLM(model, ComputeConfig(dtype="float32"))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    key = jax.random.key(0)
    params = nn.meta.unbox(jax.eval_shape(language_model.init, {PARAMS: key}, tokens))[PARAMS]
    tree = jax.eval_shape(functools.partial(fresh_adapter, language_model, method), params, key)
    return leaf_specs(nn.meta.unbox(tree))


# FIXME docstring of the merged loaded.base_folder:
# """A base that lies in a folder, known to be the one that an adapter belongs to."""


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
