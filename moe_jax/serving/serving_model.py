"""A base and its adapters on the devices, as the engine calls them."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.new_tokens import total_vocab_size
from moe_jax.config.model import ComputeConfig, ModelConfig
from moe_jax.layers.block_cache import BlockPool
from moe_jax.models.adapted import CompiledLlama
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.models.layer_views import layer_views
from moe_jax.serving.adapter_slots import FilledSlots, slot_name
from moe_jax.serving.model_calls import (
    Cache,
    Call,
    Routed,
    SlotAdapter,
    adapter_values,
    is_by_row,
    method_key,
)
from moe_jax.serving.programs import Prefilled, Programs
from moe_jax.serving.row_sampling import Chosen, RowSettings, TokenHistory
from moe_jax.sharding.rules import num_row_shards

_GROWTH = 4
"""Ratio of the numbers of rows that decoding is compiled for."""


class EngineState:
    """Arrays that calls replace.

    Attributes:
      cache: keys, values and values of adapters.
      history: tokens of each row.
    """

    def __init__(self, cache: Cache, history: TokenHistory):
        self.cache = cache
        self.history = history


class ServingModel:
    """A base and its adapters.

    Attributes:
      methods: method of each adapter, by name.
      programs: compiled functions.
      prompt_rows: number of rows of a call with a part of a prompt.
    """

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
        # A CPU program that scans the layers copies each out of the stack.
        scans = mesh is not None or jax.devices()[0].platform != "cpu"
        views = (lambda tree: tree) if scans else functools.partial(layer_views, config)
        self._decoding_adapters = {}
        self._row_shapes: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        self._adapters = {}
        for name, (method, tree) in adapters.items():
            by_row, constants = self._cached_values(method, params, tree)
            self._row_shapes[method_key(method)] = by_row
            self._adapters[name] = SlotAdapter(tree, constants)
            self._decoding_adapters[name] = SlotAdapter(views(tree), constants)
        size = total_vocab_size(config.vocab_size, self.methods.values())
        self.programs = Programs(self._llama, params, views(params), size)

    def call_sizes(self, max_rows: int) -> tuple[int, ...]:
        """Numbers of rows that decoding is compiled for, ascending."""
        sizes, size = [], 1
        while size < max_rows:
            sizes.append(size)
            size *= _GROWTH
        multiple = self._shards
        return tuple(sorted({-(-size // multiple) * multiple for size in (*sizes, max_rows)}))

    def new_state(self, rows: int, blocks: int, block: int) -> EngineState:
        """An empty cache and history for `rows` rows."""
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
        counts = self._zeros((rows + 1, self.programs.vocab_size), jnp.dtype(jnp.int32))
        in_prompt = self._zeros((rows + 1, self.programs.vocab_size), jnp.dtype(bool))
        return EngineState(Cache(BlockPool(*pool), row_values), TokenHistory(counts, in_prompt))

    def begin_history(self, state: EngineState, slot: int, prompt: Sequence[int]) -> None:
        """Starts the history of a row with this prompt."""
        in_prompt = np.zeros(self.programs.vocab_size, bool)
        in_prompt[list(prompt)] = True
        state.history = self.programs.begin_row(state.history, np.int32(slot), in_prompt)

    def prefill(self, state: EngineState, slots: FilledSlots, call: Call) -> Prefilled:
        """See `Programs.prefill`."""
        adapters = _of(slots, self._adapters)
        prefilled, state.cache = self.programs.prefill(slots.layout, adapters, state.cache, call)
        return prefilled

    def first_tokens(
        self,
        state: EngineState,
        slots: FilledSlots,
        prefilled: Prefilled,
        call: Call,
        settings: RowSettings,
    ) -> Chosen:
        """See `Programs.first_tokens`."""
        chosen, state.history = self.programs.first_tokens(
            slots.layout, _of(slots, self._adapters), prefilled.last, state.history, call, settings
        )
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
        scores = self.programs.score(
            slots.layout, _of(slots, self._adapters), prefilled.hidden, call.windows, targets
        )
        return targets, *map(np.asarray, scores)

    def decode(
        self, state: EngineState, slots: FilledSlots, call: Call, settings: RowSettings
    ) -> tuple[Chosen, dict[str, Routed]]:
        """See `Programs.decode`."""
        chosen, routing, state.cache, state.history = self.programs.decode(
            slots.layout,
            _of(slots, self._decoding_adapters),
            state.cache,
            state.history,
            call,
            settings,
        )
        return chosen, routing

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
