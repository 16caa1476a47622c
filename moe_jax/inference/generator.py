"""Decoding: many prompts side by side, through different adapters or none, token by token."""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.rows import Segment
from moe_jax.config.model import ComputeConfig, FloatType, ModelConfig
from moe_jax.config.parse import located
from moe_jax.data.batch import PADDING_ID, padded_length
from moe_jax.errors import CheckpointError
from moe_jax.inference import decoding
from moe_jax.inference.batch_rows import BatchRows, arrange_rows
from moe_jax.inference.decoding import MAX_STEPS, Drawing, State
from moe_jax.inference.limits import check_buckets, check_requests, context_of, default_buckets
from moe_jax.inference.sampling import SamplingConfig
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding import axes
from moe_jax.sharding.rules import BATCH_SPEC, RULES

_SECONDS_PER_CALL = 0.05
"""How long the device may work before tokens are handed out: it is to look like streaming."""

_CACHE_STEP = 64
"""Caches have a multiple of so many slots, so that prompts and answers of like lengths share one
compiled program."""


class Request(NamedTuple):
    """A prompt to be continued.

    Attributes:
      tokens: of the prompt; at least one.
      adapter: whose rows it belongs to; None is the base as it is.
      sample: which of several continuations of the same prompt this is.
      number: of the prompt among all that the user gave, over all batches. What is drawn depends on
        the seed, `number`, `sample` and the position, so not on what else is in the batch.
    """

    tokens: tuple[int, ...]
    adapter: str | None = None
    sample: int = 0
    number: int = 0


class Generator:
    """A base and adapters on it, ready to continue prompts.

    Prompts are padded on the left to the length of a bucket. Reading them is compiled once for each
    bucket and division of the rows over adapters, and the loop over new tokens once for each length
    of the cache and division; what adapters are called and what they weigh does not matter.

    Attributes:
      model: the base's architecture.
      params: the base's weights.
      adapters: each adapter's weights.
      mesh: where they are; None is one device.
      context: tokens of a prompt and its continuation together, at most.
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
        """Prepares; nothing is compiled yet.

        Args:
          model: the base's architecture.
          params: its weights, on `mesh` if there is one.
          adapters: the method and the weights of each adapter, by name; on `mesh` too.
          compute: in which type to compute. New tokens always attend with the `xla` kernel.
          max_length: tokens of a prompt and its continuation together, at most; by default the
            model's context, and never more than it.
          mesh: None computes on the device that holds `params`.
          buckets: ascending lengths that prompts are padded to; by default powers of two.

        Raises:
          ConfigError: the model cannot be computed so, an adapter does not go with the model, or a
            length exceeds its context.
        """
        with located("compute"):
            compute.check_model(model)
        for name, (method, _) in adapters.items():
            with located(f"adapter {name!r}"):
                method.check_model(model)
        self.context = context_of(model, max_length)
        self.buckets = (
            default_buckets(self.context)
            if buckets is None
            else check_buckets(buckets, self.context)
        )
        self.mesh = mesh
        self.model = model
        self.params = params
        self.adapters = {name: tree for name, (_, tree) in adapters.items()}
        self._model = LlamaForCausalLM(model, replace(compute, remat="none"))
        self._methods = {name: method for name, (method, _) in adapters.items()}
        self._functions: list[tuple[Any, Callable[..., Any]]] = []

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
        """Continues all requests side by side; everything is checked before the first step.

        Args:
          requests: one for each row.
          sampling: how tokens are chosen.
          max_new_tokens: of each row, at most.
          eos_ids: a row ends with the first of these, which is given too.
          seed: of what is drawn, from 0 to 2^32 - 1.
          stop: asked after each new token, with the row and all its new tokens; true ends the row.

        Yields:
          The next token of each row, None for rows that have ended. The last yield is the one at
          which the last row ends.

        Raises:
          ConfigError: an adapter that is unknown or a classifier, or a number out of range.
          DataError: a prompt is empty, has ids that the model lacks, or is too long for its
            continuation to fit into the context.
          CheckpointError: while decoding, logits are not finite.
        """
        prompts = [request.tokens for request in requests]
        names = [request.adapter for request in requests]
        check_requests(
            self.model, self._methods, prompts, names, max_new_tokens, seed, self.context
        )
        if not requests:
            return iter(())
        return self._stream(requests, sampling, max_new_tokens, tuple(eos_ids), seed, stop)

    @property
    def dtype(self) -> FloatType:
        """In which type is computed and remembered."""
        return self._model.compute.dtype

    def cache_length(self, prompt: int, new_tokens: int) -> int:
        """Slots of the cache for prompts of so many tokens at most and so many new ones."""
        slots = padded_length(prompt, self.buckets) + new_tokens
        return -(-slots // _CACHE_STEP) * _CACHE_STEP

    def compilations(self) -> int:
        """How many programs were compiled so far."""
        return sum(function._cache_size() for _, function in self._functions)  # type: ignore[attr-defined]

    def _stream(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        max_new_tokens: int,
        eos_ids: tuple[int, ...],
        seed: int,
        stop: Callable[[int, list[int]], bool] | None,
    ) -> Iterator[list[int | None]]:
        rows = arrange_rows([r.adapter for r in requests], self._methods, self._shards)
        made: list[list[int]] = [[] for _ in requests]
        ended = [False] * len(requests)
        for tokens in self._tokens(requests, rows, sampling, max_new_tokens, eos_ids, seed, ended):
            step: list[int | None] = [None] * len(requests)
            for row, number in enumerate(rows.requests):
                if number is None or ended[number]:
                    continue
                token = int(tokens[row])
                if token < 0:
                    raise CheckpointError(
                        f"prompt {number + 1}: the model's logits are not finite; its weights, or "
                        "the adapter's, are damaged or too large for the type it computes in"
                    )
                step[number] = token
                made[number].append(token)
                ended[number] = (
                    token in eos_ids
                    or len(made[number]) == max_new_tokens
                    or (stop is not None and stop(number, made[number]))
                )
            yield step
            if all(ended):
                return

    def _tokens(
        self,
        requests: Sequence[Request],
        rows: BatchRows,
        sampling: SamplingConfig,
        max_new_tokens: int,
        eos_ids: tuple[int, ...],
        seed: int,
        ended: Sequence[bool],
    ) -> Iterator[np.ndarray]:
        """The next token of each row [B], at most `max_new_tokens` times; `ended` may change."""
        adapters = {segment: self.adapters[name] for segment, name in rows.adapters.items()}
        state, drawing = self._start(
            requests, rows, adapters, sampling, max_new_tokens, eos_ids, seed
        )
        decode = self._function(decoding.decode, rows.segments, sampling)
        eos = np.array(eos_ids, np.int32)
        yield np.asarray(state.tokens)
        left, steps = max_new_tokens - 1, 1
        while left > 0:
            done = np.array([number is None or ended[number] for number in rows.requests])
            state = state._replace(done=self._put(done))
            begin = time.perf_counter()
            now = np.int32(min(steps, left))
            with self._context():
                state, tokens, count = decode(self.params, adapters, state, drawing, eos, now)
            yield from np.asarray(tokens)[: int(count)]
            left -= int(count)
            seconds = time.perf_counter() - begin
            if seconds < _SECONDS_PER_CALL / 2:
                steps = min(2 * steps, MAX_STEPS)
            elif seconds > 2 * _SECONDS_PER_CALL:
                steps = max(steps // 2, 1)

    def _start(
        self,
        requests: Sequence[Request],
        rows: BatchRows,
        adapters: Mapping[str, Any],
        sampling: SamplingConfig,
        max_new_tokens: int,
        eos_ids: tuple[int, ...],
        seed: int,
    ) -> tuple[State, Drawing]:
        """Reads the prompts, and picks the first token of each row."""
        filler = Request((PADDING_ID,))
        batch = [filler if number is None else requests[number] for number in rows.requests]
        width = padded_length(max(len(request.tokens) for request in batch), self.buckets)
        prompts = np.full((len(batch), width), PADDING_ID, np.int32)
        seen = np.zeros((len(batch), 1), bool)
        if sampling.repetition_penalty != 1:
            seen = np.zeros((len(batch), self.model.vocab_size), bool)
        for row, (tokens, *_) in enumerate(batch):
            prompts[row, width - len(tokens) :] = tokens
            if sampling.repetition_penalty != 1:
                seen[row, list(tokens)] = True
        drawing = Drawing(
            np.uint32(seed),
            *map(
                self._put,
                (
                    np.array([request.number for request in batch], np.int32),
                    np.array([request.sample for request in batch], np.int32),
                    np.array([width - len(request.tokens) for request in batch], np.int32),
                ),
            ),
        )
        done = np.array([number is None for number in rows.requests])
        slots = self.cache_length(width, max_new_tokens)
        read = self._function(decoding.read_prompts, rows.segments, slots)
        first = self._function(decoding.first_tokens, None, sampling)
        with self._context():
            logits, cache = read(self.params, adapters, self._put(prompts), drawing.start)
            state = first(
                logits,
                cache,
                np.int32(width),
                self._put(seen),
                self._put(done),
                drawing,
                np.array(eos_ids, np.int32),
            )
        return state, drawing

    @property
    def _shards(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _put(self, array: np.ndarray) -> Any:
        """An array of rows, divided over the mesh."""
        if self.mesh is None:
            return array
        return jax.device_put(array, NamedSharding(self.mesh, BATCH_SPEC))

    def _context(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _function(
        self,
        function: Callable[..., Any],
        segments: tuple[Segment, ...] | None,
        *static: Any,
    ) -> Callable[..., Any]:
        """`function`, compiled for a division of the rows and for settings."""
        wanted = (function, segments, static)  # methods have no hash, but they compare
        for known, jitted in self._functions:
            if known == wanted:
                return jitted
        arguments = static if segments is None else (self._model.clone(segments=segments), *static)

        @functools.wraps(function)
        def with_rules(*args: Any) -> Any:
            with nn.logical_axis_rules(self._rules):
                return function(*arguments, *args)

        donated = {decoding.decode: (2,), decoding.first_tokens: (1,)}.get(function, ())
        jitted = jax.jit(with_rules, donate_argnums=donated)
        self._functions.append((wanted, jitted))
        return jitted

    @property
    def _rules(self) -> tuple[tuple[str, Any], ...]:
        """Heads of the cache stay whole where the devices do not divide them."""
        parts = 1 if self.mesh is None else self.mesh.shape["tensor"]
        if self.model.num_kv_heads % parts == 0:
            return RULES
        return ((axes.CACHE_KV_HEADS, None), *RULES)
