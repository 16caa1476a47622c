"""The base model of an adapter, and the leaves that an adapter must have."""

import functools

import jax
from flax import linen as nn

from moe_jax.adapters.method import AdapterMethod
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.leaves import LeafSpec, leaf_specs, require_same_leaves
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.hf.base_model import BaseModel, open_base, resolve_recorded
from moe_jax.hf.load import checked_leaves
from moe_jax.hf.shards import open_shards
from moe_jax.models.adapted import abstract_params, untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM


def expected_leaves(model: ModelConfig, method: AdapterMethod) -> dict[str, LeafSpec]:
    """Shape and type of every leaf of an adapter of `method` on a base of this architecture.

    The model is traced with shapes only: nothing is computed or compiled.
    """
    language_model = LlamaForCausalLM(model, ComputeConfig(dtype="float32"))
    params = nn.meta.unbox(abstract_params(language_model))
    init = functools.partial(untrained_adapter, language_model, method)
    tree = jax.eval_shape(init, params, jax.random.key(0))
    return leaf_specs(nn.meta.unbox(tree))


def open_adapter_base(adapter: SavedAdapter, base: str) -> BaseModel:
    """Opens the base model of an adapter, and checks that the adapter was trained on it.

    Args:
      adapter: adapter; its leaves are checked too.
      base: folder or hub id of its base model.

    Raises:
      CheckpointError: the base is missing, damaged or another one; the adapter's leaves are not
        those of its method.
    """
    if base == adapter.base.path:
        resolve_recorded(adapter.base)
    opened = open_base(base)
    opened.require_trained_on("the adapter", adapter.base, "give that base")
    expected = expected_leaves(opened.config, adapter.method)
    require_same_leaves(leaf_specs(adapter.tree), expected, "its weights")
    with open_shards(opened.folder) as shards:
        checked_leaves(shards, opened.config)
    return opened
