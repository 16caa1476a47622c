"""Generation of tokens: many prompts side by side, each with an adapter or with the base alone."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.adapters.method import AdapterMethod, NoAdapter
from moe_jax.adapters.new_tokens import total_vocab_size
from moe_jax.adapters.rows import AdapterRows, divide_rows
from moe_jax.config.model import ComputeConfig, FloatType, ModelConfig
from moe_jax.config.parse import located
from moe_jax.data.batch import PADDING_ID, doubled_lengths, padded_length
from moe_jax.errors import CheckpointError
from moe_jax.inference import decoding
from moe_jax.inference.decoding import MAX_STEPS, DecodeState, RowConstants
from moe_jax.inference.limits import check_buckets, check_requests, context_of
from moe_jax.inference.settings import SamplingConfig
from moe_jax.models.adapted import CompiledLlama
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.models.layer_views import layer_views, split_layers
from moe_jax.sharding.rules import BATCH_SPEC, num_row_shards

_SHORTEST_BUCKET = 16
_SECONDS_PER_CALL = 0.05
"""Target duration of one call of `decode`: short enough that output looks like a stream."""

_CACHE_MULTIPLE = 64
"""Cache lengths are multiples of this, so that similar lengths share one compiled program."""


class Request(NamedTuple):
    """Prompt to continue.

    Attributes:
      tokens: token ids of the prompt; at least one.
      adapter: name of the adapter; None is the base alone.
      sample: index among several continuations of the same prompt.
      number: index of the prompt among all prompts, over all batches. Random draws depend on the
        seed, `number`, `sample` and the position, so not on the rest of the batch.
    """

    tokens: tuple[int, ...]
    adapter: str | None = None
    sample: int = 0
    number: int = 0


class BatchLayout(NamedTuple):
    """Assignment of requests to the rows of a batch.

    Attributes:
      adapter_rows: rows of each adapter; empty if all rows are the base's. Their names do not name
        adapters, so that adapters of equal methods share compiled programs.
      adapters: adapter of each name in `adapter_rows`; the base is absent.
      requests: index of each row's request; None is a padding row.
    """

    adapter_rows: tuple[AdapterRows, ...]
    adapters: dict[str, str]
    requests: tuple[int | None, ...]


def batch_layout(
    names: Sequence[str | None], methods: Mapping[str, AdapterMethod], shards: int
) -> BatchLayout:
    """Sorts requests by adapter and distributes them over the shards.

    Args:
      names: adapter of each request; None is the base.
      methods: method of each adapter.
      shards: number of shards of the batch axis; an adapter has equally many rows in each.
    """
    methods_by_label: dict[str, AdapterMethod] = {}
    adapters: dict[str, str] = {}
    groups: list[list[int | None]] = []
    for name in (*methods, None):
        group: list[int | None] = [i for i, other in enumerate(names) if other == name]
        if not group:
            continue
        group += [None] * (-len(group) % shards)
        label = f"group{len(groups)}"
        methods_by_label[label] = NoAdapter() if name is None else methods[name]
        if name is not None:
            adapters[label] = name
        groups.append(group)
    requests: list[int | None] = []
    for shard in range(shards):
        for group in groups:
            size = len(group) // shards
            requests += group[shard * size : (shard + 1) * size]
    rows = dict(zip(methods_by_label, map(len, groups), strict=True))
    adapter_rows = divide_rows(methods_by_label, rows, shards) if adapters else ()
    return BatchLayout(adapter_rows, adapters, tuple(requests))


class _Batch(NamedTuple):
    """Requests that are decoded together, with the arguments of `TokenGenerator.stream`."""

    requests: Sequence[Request]
    layout: BatchLayout
    sampling: SamplingConfig
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    seed: int


class TokenGenerator:
    """A base and its adapters, ready to continue prompts.

    Prompts are padded on the left to the length of a bucket. Prefill is compiled once per bucket
    and layout of the batch, the decoding loop once per length of the cache and layout. Names and
    weights of adapters do not cause recompilation.

    Attributes:
      model: architecture of the base.
      params: parameters of the base.
      adapters: parameters of each adapter.
      mesh: mesh of the parameters; None is one device.
      context: largest number of tokens of a prompt and its continuation together.
      buckets: lengths that prompts are padded to.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        adapters: Mapping[str, tuple[AdapterMethod, Any]],
        *,
        compute: ComputeConfig,
        max_length: int | None = None,
        mesh: Mesh | None = None,
        buckets: Sequence[int] | None = None,
    ):
        """Checks the arguments; compiles nothing yet.

        Args:
          model: architecture of the base.
          params: parameters of the base, on `mesh` if there is one.
          adapters: method and parameters of each adapter, by name; on `mesh` too.
          compute: dtype and kernels. New tokens always attend with the `xla` kernel.
          max_length: largest number of tokens of a prompt and its continuation together; by
            default the model's context.
          mesh: None computes on the device that holds `params`.
          buckets: ascending lengths that prompts are padded to; by default powers of two.

        Raises:
          ConfigError: `compute` or an adapter does not fit the model, or a length exceeds its
            context.
        """
        with located("compute"):
            compute.check_model(model)
        for name, (method, _) in adapters.items():
            with located(f"adapter {name!r}"):
                method.check_model(model)
        self.context = context_of(model, max_length)
        self.buckets = (
            doubled_lengths(_SHORTEST_BUCKET, self.context)
            if buckets is None
            else check_buckets(buckets, self.context)
        )
        self.mesh = mesh
        self.model = model
        self.params = params
        self.adapters = {name: tree for name, (_, tree) in adapters.items()}
        self._llama = CompiledLlama(LlamaForCausalLM(model, replace(compute, remat="none")), mesh)
        self._methods = {name: method for name, (method, _) in adapters.items()}
        # On a mesh and on other devices the scan over the layers copies nothing.
        self._scans_layers = mesh is not None or jax.devices()[0].platform != "cpu"
        views = (lambda tree: tree) if self._scans_layers else partial(layer_views, model)
        self._decoding_params = views(params)
        self._decoding_adapters = {name: views(tree) for name, tree in self.adapters.items()}

    def stream(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        max_new_tokens: int,
        eos_ids: Collection[int],
        seed: int = 0,
        stop: Callable[[int, list[int]], bool] | None = None,
    ) -> Iterator[list[int | None]]:
        """Continues all requests side by side; checks everything before the first step.

        Args:
          requests: one per row.
          sampling: rule by which tokens are chosen.
          max_new_tokens: largest number of new tokens of a row.
          eos_ids: token ids that end a row; the token itself is part of the output.
          seed: random seed, from 0 to 2^32 - 1.
          stop: called after each new token with the index of the request and all its new tokens;
            returns True to end the row.

        Yields:
          The next token of each request, None for those that have ended, until the last one ends.

        Raises:
          ConfigError: an adapter is unknown or a classifier, or a number is out of range.
          DataError: a prompt is empty, has token ids beyond the vocabulary, or is too long for its
            continuation to fit into the context.
          CheckpointError: logits are not finite, found while decoding.
        """
        prompts = [request.tokens for request in requests]
        names = [request.adapter for request in requests]
        check_requests(
            self.model, self._methods, prompts, names, max_new_tokens, seed, self.context
        )
        if not requests:
            return iter(())
        layout = batch_layout(names, self._methods, num_row_shards(self.mesh))
        batch = _Batch(requests, layout, sampling, max_new_tokens, tuple(eos_ids), seed)
        return self._stream(batch, stop)

    @property
    def dtype(self) -> FloatType:
        """Dtype of the computation and of the cache."""
        return self._llama.model.compute.dtype

    def cache_length(self, prompt: int, new_tokens: int) -> int:
        """Length of the cache for prompts of at most `prompt` tokens and `new_tokens` more."""
        length = padded_length(prompt, self.buckets) + new_tokens
        return -(-length // _CACHE_MULTIPLE) * _CACHE_MULTIPLE

    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._llama.compilations

    def _stream(
        self, batch: _Batch, stop: Callable[[int, list[int]], bool] | None
    ) -> Iterator[list[int | None]]:
        generated: list[list[int]] = [[] for _ in batch.requests]
        ended = [False] * len(batch.requests)
        for tokens in self._tokens(batch, ended):
            step: list[int | None] = [None] * len(ended)
            for row, number in enumerate(batch.layout.requests):
                if number is None or ended[number]:
                    continue
                token = int(tokens[row])
                if token < 0:
                    raise CheckpointError(
                        f"prompt {number + 1}: the model's logits are not finite; its weights, or "
                        "the adapter's, are damaged or too large for the dtype of the computation"
                    )
                step[number] = token
                generated[number].append(token)
                ended[number] = (
                    token in batch.eos_ids
                    or len(generated[number]) == batch.max_new_tokens
                    or (stop is not None and stop(number, generated[number]))
                )
            yield step
            if all(ended):
                return

    def _tokens(self, batch: _Batch, ended: Sequence[bool]) -> Iterator[np.ndarray]:
        """Yields the next token of each row, int32 [B].

        The caller sets `ended` between steps; rows of ended requests are no longer computed.
        """
        layout = batch.layout
        adapters = {label: self._decoding_adapters[name] for label, name in layout.adapters.items()}
        state, constants = self._prefill(batch)
        model = self._llama.with_rows(layout.adapter_rows, scan_layers=self._scans_layers)
        decode = self._llama.jit(decoding.decode, model, batch.sampling, donate=(2,))
        eos_ids = np.array(batch.eos_ids, np.int32)
        yield np.asarray(state.tokens)
        left, steps = batch.max_new_tokens - 1, 1
        while left > 0:
            done = np.array([number is None or ended[number] for number in layout.requests])
            state = state._replace(done=self._put(done))
            begin = time.perf_counter()
            now = np.int32(min(steps, left))
            state, tokens, count = decode(
                self._decoding_params, adapters, state, constants, eos_ids, now
            )
            yield from np.asarray(tokens)[: int(count)]
            left -= int(count)
            seconds = time.perf_counter() - begin
            if seconds < _SECONDS_PER_CALL / 2:
                steps = min(2 * steps, MAX_STEPS)
            elif seconds > 2 * _SECONDS_PER_CALL:
                steps = max(steps // 2, 1)

    def _prefill(self, batch: _Batch) -> tuple[DecodeState, RowConstants]:
        """Computes the prompts and samples the first token of each row."""
        sampling, layout = batch.sampling, batch.layout
        adapters = {label: self.adapters[name] for label, name in layout.adapters.items()}
        padding = Request((PADDING_ID,))
        rows = [padding if i is None else batch.requests[i] for i in layout.requests]
        width = padded_length(max(len(row.tokens) for row in rows), self.buckets)
        prompts = np.full((len(rows), width), PADDING_ID, np.int32)
        seen = np.zeros((len(rows), 1), bool)
        if sampling.repetition_penalty != 1:
            methods = [rows.method for rows in layout.adapter_rows]
            size = total_vocab_size(self.model.vocab_size, methods)
            seen = np.zeros((len(rows), size), bool)
        for row, (tokens, *_) in enumerate(rows):
            prompts[row, width - len(tokens) :] = tokens
            if sampling.repetition_penalty != 1:
                seen[row, list(tokens)] = True
        constants = RowConstants(
            np.uint32(batch.seed),
            self._put(np.array([row.number for row in rows], np.int32)),
            self._put(np.array([row.sample for row in rows], np.int32)),
            self._put(np.array([width - len(row.tokens) for row in rows], np.int32)),
        )
        done = np.array([number is None for number in layout.requests])
        length = self.cache_length(width, batch.max_new_tokens)
        model = self._llama.with_rows(layout.adapter_rows, cache_length=length)
        prefill = self._llama.jit(decoding.prefill, model)
        first_tokens = self._llama.jit(decoding.first_tokens, sampling, donate=(1,))
        logits, cache = prefill(self.params, adapters, self._put(prompts), constants.start)
        if not self._scans_layers:
            cache = self._llama.jit(split_layers, self.model)(cache)
        state = first_tokens(
            logits,
            cache,
            np.int32(width),
            self._put(seen),
            self._put(done),
            constants,
            np.array(batch.eos_ids, np.int32),
        )
        return state, constants

    def _put(self, array: np.ndarray) -> Any:
        """Shards an array [B, ...] over the mesh."""
        if self.mesh is None:
            return array
        return jax.device_put(array, NamedSharding(self.mesh, BATCH_SPEC))
