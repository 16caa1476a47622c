"""Which leaves an adapter has, without making any."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.adapters.method import AdapterMethod
from moe_jax.checkpoints.leaves import LeafSpec, leaf_specs
from moe_jax.config.model import ComputeConfig, ModelConfig
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
