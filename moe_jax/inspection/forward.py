"""Forward passes that record the routing of tokens: sites of an adapter, and batches of rows."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.routing.statistics import TokenRouting, collect_routing
from moe_jax.data.batch import PADDING_ID, doubled_lengths, padded_length
from moe_jax.inspection.token_rows import TokenRow
from moe_jax.layers.names import ROUTING
from moe_jax.models.adapted import (
    SINGLE,
    CompiledLlama,
    abstract_params,
    apply,
    single_adapter,
)
from moe_jax.models.causal_lm import LlamaForCausalLM

_SHORTEST_LENGTH = 32
"""Rows are padded to this length times a power of two; each length is compiled once."""

Batches = Iterator[tuple[list[int], TokenRouting, np.ndarray]]
"""Indices, routing and token mask of each batch; see `route_rows`."""

_SITE_ORDER = (
    *("mlp/moe", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"),
    *("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj"),
)
"""Order of sites; the first one of an adapter is the default."""


def routing_sites(model: LlamaForCausalLM, method: AdapterMethod, tree: Any) -> list[str]:
    """Modules of an adapter with a router, from shapes only.

    Args:
      model: model without adapters.
      method: method of the adapter.
      tree: adapter tree.

    Raises:
      ValueError: the method routes but sows no routing.
    """
    params = nn.meta.unbox(abstract_params(model))
    tokens, mask = (jax.ShapeDtypeStruct((1, 2), dtype) for dtype in (jnp.int32, jnp.bool_))
    route = functools.partial(_route, model.clone(adapter_rows=single_adapter(method, 1)))
    found = jax.eval_shape(route, params, tree, tokens, mask)
    return in_order(found)


def in_order(sites: Iterable[str]) -> list[str]:
    """Sites in the order of reports; the first is the adapter's default."""
    return sorted(
        sites, key=lambda site: (_SITE_ORDER.index(site) if site in _SITE_ORDER else 99, site)
    )


def route_rows(
    model: LlamaForCausalLM,
    method: AdapterMethod,
    site: str,
    params: Any,
    tree: Any,
    rows: Sequence[TokenRow],
    batch_size: int,
) -> Batches:
    """Routing of all rows at one site, the longest rows first.

    Args:
      model: model without adapters.
      method: method of the adapter.
      site: one of `routing_sites`.
      params: frozen base parameters.
      tree: adapter tree.
      rows: sequences.
      batch_size: number of rows in a batch.

    Yields:
      Indices in `rows` of the first rows of a batch (others are padding), routing [L, B, S, E] on
      the host, and token mask bool [B, S].
    """
    longest = max(len(row.tokens) for row in rows)
    lengths = doubled_lengths(_SHORTEST_LENGTH, longest)
    llama = CompiledLlama(model)
    function = llama.jit(_route_site, llama.with_rows(single_adapter(method, batch_size)), site)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        shape = (batch_size, padded_length(len(rows[indices[0]].tokens), lengths))
        tokens, mask = np.full(shape, PADDING_ID, np.int32), np.zeros(shape, bool)
        for position, index in enumerate(indices):
            length = len(rows[index].tokens)
            tokens[position, :length] = rows[index].tokens
            mask[position, :length] = True
        yield indices, jax.device_get(function(params, tree, tokens, mask)), mask


def _route_site(model: LlamaForCausalLM, site: str, *arrays: Any) -> TokenRouting:
    return _route(model, *arrays)[site]


def _route(
    model: LlamaForCausalLM, params: Any, tree: Any, tokens: jax.Array, token_mask: jax.Array
) -> dict[str, TokenRouting]:
    """Routing at every site of rows [B, S], which are padded on the right."""
    compute = LlamaForCausalLM.hidden_states
    options: Any = {"token_mask": token_mask, "mutable": [ROUTING]}
    _, sown = apply(model, params, {SINGLE: tree}, compute, tokens, **options)
    return collect_routing(sown)[SINGLE]
