"""Compiled functions of the model: tokens of some rows into cache, routing and next tokens.

A call has rows of any adapters: one token each of all rows that decode, or a part of one prompt.
`moe_jax.serving.serving_model` compiles these functions, one program for each layout of a call.

Letters: B rows of the call, S tokens of each, R rows that the engine has, b rows of a window.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.routing.statistics import TokenRouting, collect_routing
from moe_jax.adapters.row_window import RowWindow, replace_window, take_window
from moe_jax.adapters.tree import split_by_adapter, to_collection
from moe_jax.inspection.forward import in_order
from moe_jax.layers.block_cache import BlockPool, BlockPosition, position_updates
from moe_jax.layers.kv_cache import BY_POSITION, BY_ROW
from moe_jax.layers.names import CACHE, CACHE_UPDATES, ROUTING
from moe_jax.models.adapted import SINGLE, apply, single_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.models.layer_views import join_layers, split_layers
from moe_jax.serving.row_sampling import (
    Chosen,
    RowSettings,
    TokenHistory,
    choose_tokens,
    token_logprobs,
)

RowValues = dict[str, dict[str, jax.Array]]
"""Values that adapters keep of each row, by `method_key` and path: [..., R + 1, n].

The last row takes what is written for padding."""


class Cache(NamedTuple):
    """State of the earlier tokens of all rows, on the devices.

    Attributes:
      pool: keys and values.
      row_values: values of adapters.
    """

    pool: BlockPool
    row_values: RowValues


class Call(NamedTuple):
    """Rows of a call.

    Attributes:
      tokens: int32 [B, S]; [B] in `decode`.
      token_mask: bool [B, S], false at padding, which is on the right.
      slots: int32 [B], index of each row in the engine's rows; R for padding.
      tables, lengths, prompt_length: see `BlockPosition`.
      windows: windows of the adapters, by slot.
    """

    tokens: Any
    token_mask: Any
    slots: Any
    tables: Any
    lengths: Any
    prompt_length: Any
    windows: Mapping[str, RowWindow]


class SlotAdapter(NamedTuple):
    """An adapter as an argument of a compiled function.

    Attributes:
      tree: its weights.
      constants: values that it keeps in the cache for all rows, such as DoRA's gains, by path.
    """

    tree: Any
    constants: dict[str, jax.Array]


class Routed(NamedTuple):
    """Routing of the last token of each row of a window, at the adapter's first site.

    Attributes:
      weights, load: float32 [L, b, E], see `TokenRouting`.
    """

    weights: Any
    load: Any


class Computed(NamedTuple):
    """A call after the layers.

    Attributes:
      hidden: hidden states [B, S, D].
      updates: keys and values of its tokens.
      row_values: values of adapters after the call.
      routing: routing of the last tokens, by slot; of adapters that route.
    """

    hidden: jax.Array
    updates: BlockPool
    row_values: RowValues
    routing: dict[str, Routed]


def run_layers(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    cache: Cache,
    call: Call,
) -> Computed:
    """Computes the tokens of a call.

    Args:
      model: model with the slots of this call.
      params: parameters of the base.
      adapters: adapters by slot.
      cache: the cache.
      call: rows of the call.

    Returns:
      The result of the layers, without logits.
    """
    position = BlockPosition(cache.pool, call.tables, call.lengths, call.prompt_length)
    index = call.lengths[:, None] + jnp.arange(call.tokens.shape[1])[None]
    hidden, collections = apply(
        model,
        params,
        {name: adapter.tree for name, adapter in adapters.items()},
        LlamaForCausalLM.hidden_states,
        call.tokens,
        # The frequencies of some rotary embeddings follow from the largest position.
        positions=jnp.where(call.token_mask, index, 0),
        token_mask=call.token_mask,
        cache_position=position,
        windows=call.windows,
        cache=_adapter_cache(model, adapters, cache, call),
        mutable=[CACHE_UPDATES, ROUTING],
    )
    collections = {name: join_layers(part) for name, part in collections.items()}
    updates = collections[CACHE_UPDATES]
    row_values = _with_updates(model, cache, call, updates)
    routing = _last_routing(collections, call)
    return Computed(hidden, position_updates(updates), row_values, routing)


def decode(
    model: LlamaForCausalLM,
    vocab_size: int,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    cache: Cache,
    history: TokenHistory,
    call: Call,
    settings: RowSettings,
) -> tuple[Chosen, Computed, TokenHistory]:
    """Computes the newest token of each row, `call.tokens` [B], and chooses the next one."""
    call = call._replace(tokens=call.tokens[:, None])
    computed = run_layers(model, params, adapters, cache, call)
    last = computed.hidden[:, 0]
    lengths = call.lengths + 1
    chosen, history = first_tokens(
        model, vocab_size, params, adapters, last, history,
        call.windows, settings, call.slots, lengths,
    )  # fmt: skip
    return chosen, computed, history


def prefill(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    cache: Cache,
    call: Call,
) -> tuple[Computed, jax.Array]:
    """Computes a part of a prompt.

    Returns:
      The result of the layers, and hidden states [B, D] of each row's last token.
    """
    computed = run_layers(model, params, adapters, cache, call)
    last = _last_tokens(call)[:, None, None]
    return computed, jnp.take_along_axis(computed.hidden, last, axis=1)[:, 0]


def first_tokens(
    model: LlamaForCausalLM,
    vocab_size: int,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    last: jax.Array,
    history: TokenHistory,
    windows: Mapping[str, RowWindow],
    settings: RowSettings,
    slots: jax.Array,
    lengths: jax.Array,
) -> tuple[Chosen, TokenHistory]:
    """Chooses the tokens after hidden states [B, D]; see `choose_tokens`."""
    logits = _logits(model, vocab_size, params, adapters, last, windows)
    return choose_tokens(logits, history, settings, slots, lengths)


def score(
    model: LlamaForCausalLM,
    vocab_size: int,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    hidden: jax.Array,
    windows: Mapping[str, RowWindow],
    targets: jax.Array,
) -> Any:
    """Log-probabilities of the tokens `targets` [B, S] after each token; see `Chosen`."""
    logits = _logits(model, vocab_size, params, adapters, hidden, windows)
    flat = logits.reshape(-1, logits.shape[-1])
    scores = token_logprobs(flat, targets.reshape(-1), jnp.bool_(True))
    return jax.tree.map(lambda score: score.reshape(*targets.shape, *score.shape[1:]), scores)


def _logits(
    model: LlamaForCausalLM,
    vocab_size: int,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    hidden: jax.Array,
    windows: Mapping[str, RowWindow],
) -> jax.Array:
    """Logits [B, ..., vocab_size]; -inf for new tokens that a row's adapter does not have."""
    trees = {name: adapter.tree for name, adapter in adapters.items()}
    logits = apply(model, params, trees, LlamaForCausalLM.logits, hidden, windows)
    missing = vocab_size - logits.shape[-1]
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, missing)]
    return jnp.pad(logits, padding, constant_values=-jnp.inf)


def method_key(method: AdapterMethod) -> str:
    """Key of a method in `RowValues`.

    Keys are part of compiled programs. A key that differs from process to process, such as a hash
    of strings, would hide the programs in the persistent cache.
    """
    return repr(method)


def adapter_values(
    model: LlamaForCausalLM, method: AdapterMethod, params: Any, tree: Any
) -> dict[str, jax.Array]:
    """Values that an adapter has in the cache after one token of one row, by path."""
    _, collections = apply(
        model.clone(adapter_rows=single_adapter(method, 1), cache_length=1),
        params,
        {SINGLE: tree},
        LlamaForCausalLM.hidden_states,
        jnp.zeros((1, 1), jnp.int32),
        mutable=[CACHE],
    )
    return _of_adapters(join_layers(collections[CACHE])).get(SINGLE, {})


def is_by_row(path: str) -> bool:
    """True for a value of each row, false for one of the adapter as a whole."""
    return path.rpartition("/")[2] in BY_ROW


def _of_adapters(collection: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values of adapters in a collection of the cache, by adapter and path."""
    flat = {
        path: leaf for path, leaf in flatten_dict(collection).items() if path[-1] not in BY_POSITION
    }
    return {
        name: flatten_dict(tree, sep="/")
        for name, tree in split_by_adapter(unflatten_dict(flat)).items()
    }


def _adapter_cache(
    model: LlamaForCausalLM, adapters: Mapping[str, SlotAdapter], cache: Cache, call: Call
) -> Any:
    """The collection `cache` for the modules of adapters."""
    begins = call.lengths == 0
    trees = {}
    for rows in model.adapter_rows:
        values = dict(adapters[rows.name].constants)
        for path, value in cache.row_values.get(method_key(rows.method), {}).items():
            of_rows = jnp.take(value, call.slots, axis=-2)
            of_rows = jnp.where(_along_rows(begins, of_rows), 0, of_rows)
            values[path] = take_window(call.windows[rows.name], of_rows, of_rows.ndim - 2)
        if values:
            trees[rows.name] = unflatten_dict(values, sep="/")
    collection = to_collection(trees)
    return collection if model.scan_layers else split_layers(model.config, collection)


def _with_updates(model: LlamaForCausalLM, cache: Cache, call: Call, updates: Any) -> RowValues:
    """The values of rows after a call."""
    merged = {key: dict(values) for key, values in cache.row_values.items()}
    new = _of_adapters(updates)
    for rows in model.adapter_rows:
        values = merged.get(method_key(rows.method), {})
        for path, value in values.items():
            axis = value.ndim - 2
            of_rows = jnp.take(value, call.slots, axis=axis)
            of_rows = replace_window(call.windows[rows.name], of_rows, new[rows.name][path], axis)
            values[path] = value.at[..., call.slots, :].set(of_rows)
    return merged


def _along_rows(mask: jax.Array, array: jax.Array) -> jax.Array:
    """A mask [B] in the rank of an array [..., B, n]."""
    return mask.reshape(*[1] * (array.ndim - 2), -1, 1)


def _last_tokens(call: Call) -> jax.Array:
    """Index [B] of each row's last token in the call."""
    return jnp.maximum(jnp.sum(call.token_mask, axis=1) - 1, 0)


def _last_routing(collections: Mapping[str, Any], call: Call) -> dict[str, Routed]:
    """Routing of each row's last token, by slot."""
    if ROUTING not in collections:
        return {}
    last = _last_tokens(call)
    found = {}
    for name, sites in collect_routing(collections).items():
        routing: TokenRouting = sites[in_order(sites)[0]]
        own = take_window(call.windows[name], last)[None, :, None, None]
        weights, load = (
            jnp.take_along_axis(part, own, axis=2)[:, :, 0]
            for part in (routing.weights, routing.load)
        )
        found[name] = Routed(weights, load)
    return found
