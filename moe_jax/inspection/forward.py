"""The model's side: where an adapter routes, and its routers' decisions for batches of rows."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.routing.statistics import TokenRouting, collect_routing
from moe_jax.data.batch import PADDING_ID, padded_length
from moe_jax.inspection.token_rows import TokenRow
from moe_jax.layers.names import ROUTING
from moe_jax.models.adapted import SINGLE, abstract_params, apply, single_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM

_SHORTEST = 32
"""Rows are padded to this length times a power of two, each of which is one compilation."""

Batches = Iterator[tuple[list[int], TokenRouting, np.ndarray]]
"""See `route_rows`."""

_ORDER = (
    *("mlp/moe", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"),
    *("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj"),
)
"""Sites, the first one of which is looked at unless told otherwise."""


def routing_sites(model: LlamaForCausalLM, method: AdapterMethod, tree: Any) -> list[str]:
    """Where an adapter routes; nothing is computed, and no weights of the base are needed.

    Args:
      model: without adapter_rows.
      method: of the adapter.
      tree: its weights.

    Raises:
      ValueError: the method routes, but does not sow what it does.
    """
    params = nn.meta.unbox(abstract_params(model))
    tokens, mask = (jax.ShapeDtypeStruct((1, 2), dtype) for dtype in (jnp.int32, jnp.bool_))
    route = functools.partial(_route, model.clone(adapter_rows=single_adapter(method, 1)))
    found = jax.eval_shape(route, params, tree, tokens, mask)
    return sorted(found, key=lambda site: (_ORDER.index(site) if site in _ORDER else 99, site))


def route_rows(
    model: LlamaForCausalLM,
    method: AdapterMethod,
    site: str,
    params: Any,
    tree: Any,
    rows: Sequence[TokenRow],
    batch_size: int,
) -> Batches:
    """The routers' decisions at one site, the longest rows first.

    Args:
      model, method, tree: see `routing_sites`.
      site: one of them.
      params: the base.
      rows: any number.
      batch_size: rows at once.

    Yields:
      The places in `rows` of a batch's first rows (others are empty), the decisions [L, B, S, E] on
      the host, and the mask bool [B, S] of tokens.
    """
    longest = max(len(row.tokens) for row in rows)
    lengths = [_SHORTEST]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    model = model.clone(adapter_rows=single_adapter(method, batch_size))
    function = jax.jit(lambda *arrays: _route(model, *arrays)[site])
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place].tokens))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        shape = (batch_size, padded_length(len(rows[places[0]].tokens), lengths))
        tokens, mask = np.full(shape, PADDING_ID, np.int32), np.zeros(shape, bool)
        for number, place in enumerate(places):
            length = len(rows[place].tokens)
            tokens[number, :length] = rows[place].tokens
            mask[number, :length] = True
        yield places, jax.device_get(function(params, tree, tokens, mask)), mask


def _route(
    model: LlamaForCausalLM,
    params: Any,
    tree: Any,
    tokens: jax.Array,
    token_mask: jax.Array,
) -> dict[str, TokenRouting]:
    """The decisions at every site, for rows [B, S] padded on the right."""
    compute = LlamaForCausalLM.hidden_states
    options: Any = {"token_mask": token_mask, "mutable": [ROUTING]}
    _, sown = apply(model, params, {SINGLE: tree}, compute, tokens, **options)
    return collect_routing(sown)[SINGLE]
