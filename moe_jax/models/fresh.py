"""Untrained adapters."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import Segment
from moe_jax.adapters.tree import by_adapter
from moe_jax.layers.names import ADAPTERS, PARAMS, ROUTER
from moe_jax.models.causal_lm import LlamaForCausalLM

_NAME = "fresh"


def fresh_adapter(
    model: LlamaForCausalLM, method: AdapterMethod, params: Any, key: jax.Array
) -> Any:
    """The untrained weights of one adapter; B is zero, so that they change nothing yet.

    They depend on the method, the base and the key alone: not on the adapter's name, nor on what
    is trained beside it.

    Args:
      model: the language model; its own segments do not matter.
      method: of the adapter.
      params: the frozen base, some of which methods like DoRA start from.
      key: of the random numbers.

    Returns:
      The tree of the adapter, with the logical axes of its leaves around them (`nn.meta.unbox`).
    """
    alone = model.clone(segments=(Segment(_NAME, method, 0, 1),))
    tokens = jnp.zeros((1, 2), jnp.int32)
    _, made = alone.apply(
        {PARAMS: params}, tokens, rngs={ADAPTERS: key}, mutable=[ADAPTERS, ROUTER]
    )
    return by_adapter(made[ADAPTERS])[_NAME]
