"""A base and its adapters on the devices, with the cache of the engine's rows."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.new_tokens import total_vocab_size
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.layers.block_cache import BlockPool, write_blocks
from moe_jax.models.adapted import CompiledLlama, pairs_in_dtype
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.models.layer_views import layer_views
from moe_jax.serving import model_calls
from moe_jax.serving.adapter_slots import FilledSlots, SlotLayout, slot_name
from moe_jax.serving.model_calls import (
    Cache,
    Call,
    Computed,
    Routed,
    SlotAdapter,
    adapter_values,
    is_by_row,
    method_key,
)
from moe_jax.serving.row_sampling import Chosen, RowSettings, TokenHistory, begin_row
from moe_jax.sharding.mesh import platform_of
from moe_jax.sharding.rules import num_row_shards

_GROWTH = 4
"""Ratio of the numbers of rows that decoding is compiled for."""

BLOCKS_AT_ONCE = 8
"""Blocks that attention reads at once on accelerators, where each round launches many kernels."""


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


class ServingModel:
    """A base, its adapters, and the cache of the rows that an engine computes.

    Decoding may read separate arrays of each layer (`moe_jax.models.layer_views`). Parts of prompts
    have many tokens for each weight and go through the scan over layers, which compiles faster.

    Attributes:
      methods: method of each adapter, by name.
      prompt_rows: number of rows of a call with a part of a prompt.
      blocks_at_once: number of blocks of a group, see `BlockPosition`.
      vocab_size: number of logits, with those of new tokens of adapters.
      cache: keys, values and values of adapters; calls replace its arrays.
      history: tokens of each row; calls replace its arrays.
    """

    cache: Cache
    history: TokenHistory

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        adapters: Mapping[str, tuple[AdapterMethod, Any]],
        *,
        compute: ComputeConfig,
        mesh: Mesh | None = None,
    ):
        """Prepares the weights; compiles what adapters keep for all rows, such as DoRA's gains.

        Args:
          config: architecture of the base.
          params: parameters of the base, on `mesh` if there is one.
          adapters: method and parameters of each adapter, by name; on `mesh` too.
          compute: dtype and kernels.
          mesh: None computes on the device that holds `params`.
        """
        self.methods = {name: method for name, (method, _) in adapters.items()}
        self._config = config
        self._mesh = mesh
        self._shards = num_row_shards(mesh)
        self.prompt_rows = self._shards
        bare = LlamaForCausalLM(config, replace(compute, remat="none"))
        self._llama = CompiledLlama(bare, mesh)
        self._dtype = jnp.dtype(compute.dtype)
        is_cpu = platform_of(None if mesh is None else list(mesh.devices.flat)) == "cpu"
        self.blocks_at_once = 1 if is_cpu else BLOCKS_AT_ONCE
        # A CPU program that scans the layers copies each out of the stack.
        self._scans_decoding = mesh is not None or not is_cpu
        views = (lambda t: t) if self._scans_decoding else functools.partial(layer_views, config)
        self._params, self._decoding_params = params, views(params)
        self._decoding_adapters = {}
        self._row_shapes: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        self._adapters = {}
        for name, (method, tree) in adapters.items():
            # A program would convert them for every token.
            tree = pairs_in_dtype(self._dtype, tree)
            by_row, constants = self._cached_values(method, params, tree)
            self._row_shapes[method_key(method)] = by_row
            self._adapters[name] = SlotAdapter(tree, constants)
            self._decoding_adapters[name] = SlotAdapter(views(tree), constants)
        self.vocab_size = total_vocab_size(config.vocab_size, self.methods.values())
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._write = self._llama.jit(write_blocks, donate=(0,))
        self._begin_row = self._llama.jit(begin_row, donate=(0,))

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._llama.compilations

    def call_sizes(self, max_rows: int) -> tuple[int, ...]:
        """Numbers of rows that decoding is compiled for, ascending."""
        sizes, size = [], 1
        while size < max_rows:
            sizes.append(size)
            size *= _GROWTH
        multiple = self._shards
        return tuple(sorted({-(-size // multiple) * multiple for size in (*sizes, max_rows)}))

    def allocate(self, rows: int, blocks: int, block: int) -> None:
        """Makes an empty cache of `blocks` blocks, and an empty history, for `rows` rows."""
        config = self._config
        shape = (config.num_layers, blocks + 1, config.num_kv_heads, block, config.head_dim)
        parts = 1 if self._mesh is None else self._mesh.shape["tensor"]
        heads = "tensor" if parts > 1 and config.num_kv_heads % parts == 0 else None
        pool = [self._zeros(shape, self._dtype, PartitionSpec(None, None, heads)) for _ in range(2)]
        row_values = {
            key: {
                path: self._zeros((*value.shape[:-2], rows + 1, value.shape[-1]), value.dtype)
                for path, value in values.items()
            }
            for key, values in self._row_shapes.items()
        }
        counts = self._zeros((rows + 1, self.vocab_size), jnp.dtype(jnp.int32))
        in_prompt = self._zeros((rows + 1, self.vocab_size), jnp.dtype(bool))
        self.cache = Cache(BlockPool(*pool), row_values)
        self.history = TokenHistory(counts, in_prompt)

    def begin_history(self, slot: int, prompt: Sequence[int], answer: Sequence[int] = ()) -> None:
        """Sets the history of a row to this prompt and the tokens of its answer so far."""
        in_prompt = np.zeros(self.vocab_size, bool)
        in_prompt[list(prompt)] = True
        counts = np.bincount(np.array(answer, np.int32), minlength=self.vocab_size)
        counts = counts.astype(np.int32)
        self.history = self._begin_row(self.history, np.int32(slot), in_prompt, counts)

    def prefill(self, slots: FilledSlots, call: Call) -> Prefilled:
        """Adds a part of a prompt to the cache."""
        function = self._compiled(model_calls.prefill, slots.layout)
        computed, last = function(self._params, _of(slots, self._adapters), self.cache, call)
        self._write_cache(computed, call)
        return Prefilled(computed.hidden, last, computed.routing)

    def first_tokens(
        self, slots: FilledSlots, prefilled: Prefilled, call: Call, settings: RowSettings
    ) -> Chosen:
        """Chooses the first token of an answer, after the last token of its prompt."""
        head, adapters, windows = self._head(slots, call)
        function = self._compiled(model_calls.first_tokens, head, self.vocab_size, donate=(3,))
        arguments = self._params, adapters, prefilled.last, self.history, windows, settings
        chosen, self.history = function(*arguments, call.slots, call.prompt_length)
        return chosen

    def score(
        self, slots: FilledSlots, prefilled: Prefilled, call: Call, following: Sequence[int]
    ) -> tuple[np.ndarray, ...]:
        """Log-probabilities of the tokens after each token of a part of a prompt.

        Returns:
          The tokens, int32 [B, S], of which the first `len(following)` of row 0 are valid, and the
          last three fields of `Chosen` for each of them.
        """
        targets = np.zeros(call.tokens.shape, np.int32)
        targets[0, : len(following)] = following
        head, adapters, windows = self._head(slots, call)
        function = self._compiled(model_calls.score, head, self.vocab_size)
        scores = function(self._params, adapters, prefilled.hidden, windows, targets)
        return targets, *map(np.asarray, scores)

    def decode(
        self, slots: FilledSlots, call: Call, settings: RowSettings
    ) -> tuple[Chosen, dict[str, Routed]]:
        """Adds the newest token of each row to the cache, and chooses the next one."""
        options = {"donate": (3,), "scan_layers": self._scans_decoding}
        function = self._compiled(model_calls.decode, slots.layout, self.vocab_size, **options)
        adapters = _of(slots, self._decoding_adapters)
        arguments = self._decoding_params, adapters, self.cache, self.history, call, settings
        chosen, computed, self.history = function(*arguments)
        self._write_cache(computed, call)
        return chosen, computed.routing

    def _write_cache(self, computed: Computed, call: Call) -> None:
        places = call.tables, call.lengths, call.token_mask
        pool = self._write(self.cache.pool, computed.updates, *places)
        self.cache = Cache(pool, computed.row_values)

    def _compiled(
        self,
        function: Callable[..., Any],
        layout: SlotLayout,
        *static: Any,
        donate: tuple[int, ...] = (),
        scan_layers: bool = True,
    ) -> Callable[..., Any]:
        """The compiled `function(model, *static, ...)`, for the model with these slots."""
        key = (function, layout)
        if key not in self._functions:
            model = self._llama.with_rows(layout.adapter_rows, scan_layers=scan_layers)
            self._functions[key] = self._llama.jit(function, model, *static, donate=donate)
        return self._functions[key]

    def _head(self, slots: FilledSlots, call: Call) -> tuple[SlotLayout, Any, Any]:
        """Layout, adapters and windows of the head: none if adapters do not change it."""
        if not any(method.new_tokens for method in slots.layout.methods):
            return SlotLayout(slots.layout.size), {}, {}
        return slots.layout, _of(slots, self._adapters), call.windows

    def _cached_values(
        self, method: AdapterMethod, params: Any, tree: Any
    ) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.Array]]:
        """Shapes of what an adapter keeps in the cache of a row, and what it keeps for all rows."""
        compute = functools.partial(adapter_values, self._llama.model, method)
        with self._llama.context():
            shapes = jax.eval_shape(self._llama.traceable(compute), params, tree)
        by_row = {path: shape for path, shape in shapes.items() if is_by_row(path)}
        if len(by_row) == len(shapes):
            return by_row, {}
        values = self._llama.jit(adapter_values, self._llama.model, method)(params, tree)
        return by_row, {path: value for path, value in values.items() if path not in by_row}

    def _zeros(
        self, shape: tuple[int, ...], dtype: jnp.dtype, spec: PartitionSpec | None = None
    ) -> jax.Array:
        if self._mesh is None:
            return jnp.zeros(shape, dtype)
        sharding = NamedSharding(self._mesh, spec or PartitionSpec())
        return jax.device_put(np.zeros(shape, dtype), sharding)


def _of(slots: FilledSlots, adapters: Mapping[str, SlotAdapter]) -> dict[str, SlotAdapter]:
    """The adapter in each slot."""
    return {slot_name(index): adapters[name] for index, name in enumerate(slots.adapters)}
