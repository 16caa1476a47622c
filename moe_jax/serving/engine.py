"""The engine: a thread that computes answers to requests that come and go.

Between two tokens, answers that have ended leave their rows, waiting ones take them, and at most
one part of one prompt is computed. All rows that decode then go on by a token, in one call or, with
more adapters than a program has slots for, in several.
"""

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from moe_jax.config.parse import require
from moe_jax.inference.decoding import NOT_FINITE
from moe_jax.serving.adapter_slots import FilledSlots, fill_slots, layouts, take_turns
from moe_jax.serving.answer import OngoingAnswer, TokenRecord
from moe_jax.serving.model_calls import Call, Routed
from moe_jax.serving.row_sampling import Chosen, RowSettings
from moe_jax.serving.row_table import Row, RowTable
from moe_jax.serving.serving_model import ServingModel
from moe_jax.serving.token_records import (
    chosen_record,
    row_settings,
    scored_record,
    token_routing,
)

NOT_FINITE_MESSAGE = (
    "the model's logits are not finite; its weights, or the adapter's, are damaged or too large "
    "for the dtype of the computation"
)


class QueueFullError(Exception):
    """The queue has no room for a request."""


class ClosedError(Exception):
    """The engine accepts no further requests."""


class Observer(Protocol):
    """Receives what the engine does; called by its thread."""

    def first_token(self, answer: OngoingAnswer) -> None:
        """An answer has its first token."""

    def token(self, answer: OngoingAnswer, seconds: float) -> None:
        """An answer has a further token, `seconds` after the one before."""


class EngineLimits(NamedTuple):
    """Sizes of the engine.

    Attributes:
      max_rows: number of answers that are computed side by side.
      max_length: largest number of tokens of a prompt and its answer.
      max_queue: number of answers that may wait for a row.
      cache_tokens: number of tokens that the cache holds, of all rows together.
      block: positions of a block of the cache.
      chunks: numbers of tokens of a prompt that are computed at a time.
    """

    max_rows: int = 16
    max_length: int = 2048
    max_queue: int = 256
    cache_tokens: int = 8192
    block: int = 64
    chunks: tuple[int, ...] = (32, 128)

    def check(self) -> None:
        """Refuses sizes that do not fit.

        Raises:
          ConfigError: a size is not positive, or the cache is too small for one row.
        """
        for name in ("max_rows", "max_length", "max_queue", "cache_tokens"):
            value = getattr(self, name)
            require(value >= 1, name, f"must be positive, got {value}")
        require(
            self.cache_tokens >= self.max_length,
            "cache_tokens",
            f"{self.cache_tokens} tokens do not hold one row of `max_length` {self.max_length}; "
            "give at least that many",
        )


class Engine:
    """Computes answers in a thread of its own.

    Attributes:
      limits: sizes.
      failure: the exception that ended the thread; None while it runs.
    """

    def __init__(self, model: ServingModel, limits: EngineLimits, observer: Observer | None = None):
        """Allocates the cache.

        Args:
          model: base and adapters.
          limits: sizes.
          observer: receives times of tokens.
        """
        limits.check()
        self.limits = limits
        self.failure: BaseException | None = None
        self._model = model
        self._observer = observer
        self._sizes = model.call_sizes(limits.max_rows)
        self._layouts = {
            size: layouts(size, model.methods) for size in {model.prompt_rows, *self._sizes}
        }
        blocks = -(-limits.cache_tokens // limits.block)
        self._state = model.new_state(limits.max_rows, blocks, limits.block)
        self._table = RowTable(limits.max_rows, blocks, limits.block, limits.max_length)
        self._waiting: deque[OngoingAnswer] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._ends_now = False
        self._thread: threading.Thread | None = None

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._model.programs.compilations

    @property
    def waiting(self) -> int:
        """Number of answers that wait for a row, without cancelled ones. For any thread."""
        with self._changed:
            return sum(not answer.is_cancelled for answer in self._waiting)

    @property
    def rows_in_use(self) -> int:
        """Number of rows that answers have."""
        return len(self._table.rows)

    @property
    def blocks_in_use(self) -> int:
        """Number of blocks of the cache that rows own."""
        return self._table.blocks_in_use

    def start(self, on_end: Callable[[], None] = lambda: None) -> None:
        """Starts the thread.

        Args:
          on_end: called by the thread when it ends; `failure` then has the exception, if any.
        """
        self._thread = threading.Thread(
            target=self._run, args=(on_end,), name="moe_jax engine", daemon=True
        )
        self._thread.start()

    def submit(self, answers: Sequence[OngoingAnswer]) -> None:
        """Queues the answers of a request, all or none. For any thread.

        Raises:
          QueueFullError: the queue has no room for them.
          ClosedError: the engine accepts no further requests.
        """
        with self._changed:
            if self._is_closed or self.failure is not None:
                raise ClosedError
            if self.waiting + len(answers) > self.limits.max_queue:
                raise QueueFullError
            self._waiting.extend(answers)
            self._changed.notify()

    def wake(self) -> None:
        """Makes the thread look at cancelled answers. For any thread."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Accepts no further requests; the thread ends when all answers have ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def stop(self) -> None:
        """Ends the thread after its current step, and all answers with an error."""
        with self._changed:
            self._is_closed = self._ends_now = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end of the thread; returns False after `timeout` seconds."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def warm_up(self) -> None:
        """Compiles every program that a request can need. Before `start`.

        Each is called twice: what programs return may be placed on devices in another way than
        what they begin with, and XLA compiles for both.
        """
        for _ in range(2):
            self._call_every_program()

    def _call_every_program(self) -> None:
        """Calls every program, on rows of padding."""
        model, state = self._model, self._state
        for layout in self._layouts[model.prompt_rows]:
            slots = fill_slots([layout], model.methods, [])
            for chunk in self.limits.chunks:
                call = self._call([], slots, [], chunk)
                prefilled = model.prefill(state, slots, call)
                model.score(slots, prefilled, call, [])
                model.first_tokens(state, slots, prefilled, call, self._settings([], layout.size))
        for layout in (layout for size in self._sizes for layout in self._layouts[size]):
            slots = fill_slots([layout], model.methods, [])
            call = self._call([], slots, [], 1)
            model.decode(state, slots, call, self._settings([], layout.size))
        model.begin_history(state, self.limits.max_rows, ())

    def _run(self, on_end: Callable[[], None]) -> None:
        try:
            while self._wait_for_work():
                self._step()
            message = "the server is shutting down"
        except BaseException as error:  # noqa: BLE001  nothing else would answer the requests
            self.failure = error
            message = "the server failed; its log has the reason"
        with self._changed:
            self._is_closed = True
            left = [row.answer for row in self._table.rows] + list(self._waiting)
            self._waiting.clear()
        for answer in left:
            answer.fail(message, status=503)
        on_end()

    def _wait_for_work(self) -> bool:
        """Waits for answers to compute; False if there will be none."""
        with self._changed:
            while not self._waiting and not self._table.rows:
                if self._is_closed:
                    return False
                self._changed.wait()
            return not self._ends_now

    def _step(self) -> None:
        """One part of a prompt, and one token of each row that decodes."""
        self._remove_ended()
        self._admit()
        prefilling = next((row for row in self._table.rows if not row.is_prefilled), None)
        decoding = [row for row in self._table.rows if row.is_prefilled]
        if prefilling is not None:
            self._prefill(prefilling)
        names = [row.answer.request.adapter for row in decoding]
        for indices in take_turns(self._model.methods, names, self._sizes[-1]):
            self._decode([decoding[index] for index in indices])
        self._remove_ended()

    def _remove_ended(self) -> None:
        for row in [r for r in self._table.rows if r.answer.is_ended or r.answer.is_cancelled]:
            self._table.remove(row)

    def _admit(self) -> None:
        """Gives rows to waiting answers, in their order."""
        with self._changed:
            for answer in [answer for answer in self._waiting if answer.is_cancelled]:
                self._waiting.remove(answer)
            while self._waiting:
                answer = self._waiting[0]
                row = self._table.add(answer)
                if row is None:
                    return
                self._waiting.popleft()
                if answer.request.has_penalties:
                    self._model.begin_history(self._state, row.slot, answer.request.tokens)

    def _prefill(self, row: Row) -> None:
        """Computes the next part of a row's prompt, and after the last one the first token."""
        request = row.answer.request
        left = request.tokens[row.cached :]
        chunk = next((c for c in self.limits.chunks if c >= len(left)), self.limits.chunks[-1])
        part = left[:chunk]
        size = self._model.prompt_rows
        slots = self._fill([row], size)
        call = self._call([row], slots, [part], chunk)
        prefilled = self._model.prefill(self._state, slots, call)
        if request.scores_prompt:
            begin = row.cached
            following = request.tokens[begin + 1 : begin + 1 + len(part)]
            scores = self._model.score(slots, prefilled, call, following)
            wanted = request.logprobs or 0
            records = [scored_record(scores, place, wanted) for place in range(len(following))]
            if not all(np.isfinite(record.logprob or 0.0) for record in records):
                row.answer.fail(NOT_FINITE_MESSAGE)
                return
            first = [TokenRecord(request.tokens[0])] if begin == 0 else []
            with _failing_alone(row.answer):
                row.answer.add_prompt([*first, *records])
        row.cached += len(part)
        if row.answer.is_ended or not row.is_prefilled:
            return
        if request.max_tokens == 0:
            row.answer.finish_prompt()
            return
        settings = self._settings([row], size)
        chosen = self._model.first_tokens(self._state, slots, prefilled, call, settings)
        self._add_tokens([row], slots, chosen, prefilled.routing)

    def _decode(self, rows: Sequence[Row]) -> None:
        """Computes the next token of rows."""
        size = next(size for size in self._sizes if size >= len(rows))
        slots = self._fill(rows, size)
        ordered: list[Row] = [rows[0]] * len(rows)
        for row, place in zip(rows, slots.order, strict=True):
            ordered[place] = row
        call = self._call(ordered, slots, [(row.answer.newest,) for row in ordered], 1)
        settings = self._settings(ordered, size)
        chosen, routing = self._model.decode(self._state, slots, call, settings)
        for row in ordered:
            row.cached += 1
        self._add_tokens(ordered, slots, chosen, routing)

    def _fill(self, rows: Sequence[Row], size: int) -> FilledSlots:
        methods = self._model.methods
        names = [row.answer.request.adapter for row in rows]
        return fill_slots(self._layouts[size], methods, names)

    def _call(
        self, rows: Sequence[Row], slots: FilledSlots, tokens: Sequence[Sequence[int]], width: int
    ) -> Call:
        """The call for these rows, with `tokens` of each, padded to the layout and to `width`."""
        size = slots.layout.size
        padded, mask = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
        lengths, known = np.zeros(size, np.int32), np.zeros(size, np.int32)
        places = np.full(size, self.limits.max_rows, np.int32)
        for index, (row, own) in enumerate(zip(rows, tokens, strict=True)):
            padded[index, : len(own)] = own
            mask[index, : len(own)] = True
            lengths[index] = row.cached
            known[index] = max(len(row.answer.request.tokens), row.cached + len(own))
            places[index] = row.slot
        tables = self._table.tables(rows, size)
        return Call(padded, mask, places, tables, lengths, known, slots.windows)

    def _settings(self, rows: Sequence[Row], size: int) -> RowSettings:
        requests = [row.answer.request for row in rows]
        return row_settings(requests, size, self._model.programs.vocab_size)

    def _add_tokens(
        self,
        rows: Sequence[Row],
        slots: FilledSlots,
        chosen: Chosen,
        routing: Mapping[str, Routed],
    ) -> None:
        """Gives rows, in the order of their call, their new tokens."""
        tokens = np.asarray(chosen.tokens)
        requests = [row.answer.request for row in rows]
        if any(request.logprobs is not None for request in requests):
            chosen = Chosen(*map(np.asarray, chosen))
        host_routing = {}
        if any(request.wants_routing for request in requests):
            host_routing = {name: Routed(*map(np.asarray, r)) for name, r in routing.items()}
        for place, row in enumerate(rows):
            answer, token = row.answer, int(tokens[place])
            if answer.is_cancelled:
                continue
            if token == NOT_FINITE:
                answer.fail(NOT_FINITE_MESSAGE)
                continue
            with _failing_alone(answer):
                record = TokenRecord(token)
                if answer.request.logprobs is not None:
                    record = chosen_record(chosen, place, answer.request.logprobs)
                if answer.request.wants_routing:
                    record = record._replace(routing=token_routing(slots, host_routing, place))
                self._add_token(answer, record)

    def _add_token(self, answer: OngoingAnswer, record: TokenRecord) -> None:
        before, is_first = answer.latest, not answer.generated
        answer.add_token(record)
        if self._observer is not None and is_first:
            self._observer.first_token(answer)
        elif self._observer is not None:
            self._observer.token(answer, answer.latest - before)


@contextlib.contextmanager
def _failing_alone(answer: OngoingAnswer) -> Iterator[None]:
    """Ends an answer whose text or records raise an exception; the others go on."""
    try:
        yield
    except Exception:  # noqa: BLE001  whatever it is
        traceback.print_exc()
        answer.fail("the answer failed; the server's log has the reason")
