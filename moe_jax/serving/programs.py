"""The compiled functions of the engine, one for each layout of a call."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.row_window import RowWindow
from moe_jax.layers.block_cache import write_blocks
from moe_jax.models.adapted import CompiledLlama, apply
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.serving.adapter_slots import SlotLayout
from moe_jax.serving.model_calls import Cache, Call, Computed, Routed, SlotAdapter, run_layers
from moe_jax.serving.row_sampling import (
    Chosen,
    RowSettings,
    TokenHistory,
    begin_row,
    choose_tokens,
    token_logprobs,
)


class Prefilled(NamedTuple):
    """A part of a prompt after the layers.

    Attributes:
      hidden: hidden states [B, S, D].
      last: hidden states [B, D] of each row's last token.
      routing: routing of the last token, by slot.
    """

    hidden: jax.Array
    last: jax.Array
    routing: dict[str, Routed]


class Programs:
    """Compiled functions over one base.

    Decoding may read separate arrays of each layer (`moe_jax.models.layer_views`). Parts of prompts
    have many tokens for each weight and go through the scan over layers, which compiles faster.

    Attributes:
      vocab_size: number of logits, with those of new tokens of adapters.
    """

    def __init__(self, llama: CompiledLlama, params: Any, decoding_params: Any, vocab_size: int):
        """Compiles nothing yet.

        Args:
          llama: the model.
          params: parameters of the base.
          decoding_params: the same or, if layers are separate in decoding, views of them.
          vocab_size: number of logits.
        """
        self.vocab_size = vocab_size
        self._llama = llama
        self._params = params
        self._decoding_params = decoding_params
        self._scans_decoding = decoding_params is params
        self._write = llama.jit(write_blocks, donate=(0,))
        self._begin_row = llama.jit(begin_row, donate=(0,))

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._llama.compilations

    def decode(
        self,
        layout: SlotLayout,
        adapters: Mapping[str, SlotAdapter],
        cache: Cache,
        history: TokenHistory,
        call: Call,
        settings: RowSettings,
    ) -> tuple[Chosen, dict[str, Routed], Cache, TokenHistory]:
        """Adds the newest token of each row to the cache, and chooses the next one."""
        options = {"donate": (3,), "scan_layers": self._scans_decoding}
        function = self._function(_decode, layout, self.vocab_size, **options)
        arguments = self._decoding_params, adapters, cache, history, call, settings
        chosen, computed, history = function(*arguments)
        return chosen, computed.routing, self._written(cache, computed, call), history

    def prefill(
        self,
        layout: SlotLayout,
        adapters: Mapping[str, SlotAdapter],
        cache: Cache,
        call: Call,
    ) -> tuple[Prefilled, Cache]:
        """Adds a part of a prompt to the cache."""
        function = self._function(_prefill, layout)
        computed, last = function(self._params, adapters, cache, call)
        prefilled = Prefilled(computed.hidden, last, computed.routing)
        return prefilled, self._written(cache, computed, call)

    def first_tokens(
        self,
        layout: SlotLayout,
        adapters: Mapping[str, SlotAdapter],
        last: jax.Array,
        history: TokenHistory,
        call: Call,
        settings: RowSettings,
    ) -> tuple[Chosen, TokenHistory]:
        """Chooses the first token of an answer, after the last token of its prompt."""
        head = self._head(layout)
        function = self._function(_first_tokens, head, self.vocab_size, donate=(3,))
        lengths = call.prompt_length
        return function(
            self._params,
            _of_slots(head, adapters),
            last,
            history,
            _of_slots(head, call.windows),
            settings,
            call.slots,
            lengths,
        )

    def score(
        self,
        layout: SlotLayout,
        adapters: Mapping[str, SlotAdapter],
        hidden: jax.Array,
        windows: Mapping[str, RowWindow],
        targets: Any,
    ) -> Any:
        """Log-probabilities of the tokens `targets` [B, S] after each token; see `Chosen`."""
        head = self._head(layout)
        function = self._function(_score, head, self.vocab_size)
        slots = _of_slots(head, adapters), hidden, _of_slots(head, windows)
        return function(self._params, *slots, targets)

    def begin_row(self, history: TokenHistory, slot: Any, in_prompt: Any) -> TokenHistory:
        """See `moe_jax.serving.row_sampling.begin_row`."""
        return self._begin_row(history, slot, in_prompt)

    def _written(self, cache: Cache, computed: Computed, call: Call) -> Cache:
        """The cache with a call's tokens; its former arrays are gone."""
        places = call.tables, call.lengths, call.token_mask
        return Cache(self._write(cache.pool, computed.updates, *places), computed.row_values)

    def _function(
        self,
        function: Callable[..., Any],
        layout: SlotLayout,
        *static: Any,
        donate: tuple[int, ...] = (),
        scan_layers: bool = True,
    ) -> Callable[..., Any]:
        """The compiled `function(model, *static, ...)`, for the model with these slots."""
        model = self._llama.with_rows(layout.adapter_rows, scan_layers=scan_layers)
        return self._llama.jit(function, model, *static, donate=donate)

    def _head(self, layout: SlotLayout) -> SlotLayout:
        """The layout, without adapters if they do not change the head."""
        return layout if has_new_tokens(layout.methods) else SlotLayout(layout.size)


def has_new_tokens(methods: Sequence[AdapterMethod]) -> bool:
    """True if one of the methods has new tokens."""
    return any(method.new_tokens for method in methods)


def _of_slots(layout: SlotLayout, by_slot: Mapping[str, Any]) -> dict[str, Any]:
    return {rows.name: by_slot[rows.name] for rows in layout.adapter_rows}


def _decode(
    model: LlamaForCausalLM,
    vocab_size: int,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    cache: Cache,
    history: TokenHistory,
    call: Call,
    settings: RowSettings,
) -> tuple[Chosen, Computed, TokenHistory]:
    computed = run_layers(model, params, adapters, cache, call)
    logits = _logits(model, vocab_size, params, adapters, computed.hidden[:, 0], call.windows)
    lengths = call.lengths + 1
    chosen, history = choose_tokens(logits, history, settings, call.slots, lengths)
    return chosen, computed, history


def _prefill(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    cache: Cache,
    call: Call,
) -> tuple[Computed, jax.Array]:
    """The call after the layers, and hidden states [B, D] of each row's last token."""
    computed = run_layers(model, params, adapters, cache, call)
    last = jnp.maximum(jnp.sum(call.token_mask, axis=1) - 1, 0)
    return computed, jnp.take_along_axis(computed.hidden, last[:, None, None], axis=1)[:, 0]


def _first_tokens(
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
    logits = _logits(model, vocab_size, params, adapters, last, windows)
    return choose_tokens(logits, history, settings, slots, lengths)


def _score(
    model: LlamaForCausalLM,
    vocab_size: int,
    params: Any,
    adapters: Mapping[str, SlotAdapter],
    hidden: jax.Array,
    windows: Mapping[str, RowWindow],
    targets: jax.Array,
) -> Any:
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
