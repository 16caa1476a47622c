"""The engine: a thread that computes answers to requests that come and go.

Between two tokens, answers that have ended leave their rows, waiting ones take them, and at most
one part of one prompt is computed. All rows that decode then go on by a token, in one call or, with
more adapters than a program has slots for, in several.

Where all rows go on and no request has come or gone, the next step is dispatched with tokens that
are still on the devices, and the host reads them while the devices compute. A row that then ends
for another reason than its length, such as a stop string, gets one more token, which is dropped.

Rows grow by blocks of the cache. Where none is free, the newest row gives way: its answer waits
again, before all others, and a later row computes its tokens once more without sending them twice.
The oldest row never gives way to another, and the cache holds the longest row, so that every answer
comes to its end.
"""

import contextlib
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import numpy as np

from moe_jax.inference.decoding import NOT_FINITE
from moe_jax.serving.adapter_slots import layouts, take_turns
from moe_jax.serving.answer import OngoingAnswer, TokenRecord
from moe_jax.serving.call_rows import (
    CallRows,
    call_rows,
    chosen_record,
    scored_record,
    token_routing,
)
from moe_jax.serving.limits import EngineLimits
from moe_jax.serving.model_calls import Routed
from moe_jax.serving.row_sampling import Chosen
from moe_jax.serving.row_table import Row, RowTable
from moe_jax.serving.serving_model import ServingModel

NOT_FINITE_MESSAGE = (
    "the model's logits are not finite; its weights, or the adapter's, are damaged or too large "
    "for the dtype of the computation"
)


class QueueFullError(Exception):
    """The queue has no room for a request."""


class ClosedError(Exception):
    """The engine accepts no further requests."""


class _InFlight(NamedTuple):
    """A call whose tokens have not been read from the devices."""

    rows: CallRows
    chosen: Chosen
    routing: Mapping[str, Routed]


class Observer(Protocol):
    """Receives what the engine does; called by its thread."""

    def first_token(self, answer: OngoingAnswer) -> None:
        """An answer has its first token."""

    def token(self, answer: OngoingAnswer, seconds: float) -> None:
        """An answer has a further token, `seconds` after the one before."""


class Engine:
    """Computes answers in a thread of its own.

    Attributes:
      limits: sizes.
      failure: the exception that ended the thread; None while it runs.
      preemptions: number of rows that gave way to older ones.
    """

    def __init__(self, model: ServingModel, limits: EngineLimits, observer: Observer | None = None):
        """Allocates the cache.

        Args:
          model: base and adapters, of one engine at a time.
          limits: sizes.
          observer: receives times of tokens.
        """
        limits.check()
        self.limits = limits
        self.failure: BaseException | None = None
        self.preemptions = 0
        self._model = model
        self._observer = observer
        self._sizes = model.call_sizes(limits.max_rows)
        self._layouts = {
            size: layouts(size, model.methods) for size in {model.prompt_rows, *self._sizes}
        }
        blocks = -(-limits.cache_tokens // limits.block)
        model.allocate(limits.max_rows, blocks, limits.block)
        sizes = limits.max_rows, blocks, limits.block, limits.max_length
        self._table = RowTable(*sizes, model.blocks_at_once)
        self._called: list[Row] = []  # rows of `_calls`
        self._calls: list[CallRows] = []
        self._in_flight: list[_InFlight] = []
        self._queue_changed = False
        self._on_step: Callable[[], None] = lambda: None
        self._waiting: deque[OngoingAnswer] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._ends_now = False
        self._thread: threading.Thread | None = None

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far."""
        return self._model.compilations

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

    def start(
        self,
        on_step: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the thread.

        Args:
          on_step: called by the thread after it gave answers tokens or ended them.
          on_end: called by the thread when it ends; `failure` then has the exception, if any.
        """
        self._on_step = on_step
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
            self._queue_changed = True
            self._changed.notify()

    def wake(self) -> None:
        """Makes the thread look at cancelled answers. For any thread."""
        with self._changed:
            self._queue_changed = True
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
        model = self._model
        for layout in self._layouts[model.prompt_rows]:
            padding = call_rows(model, self._table, [layout], [])
            for chunk in self.limits.chunks:
                call = padding.prompt_call([], chunk)
                prefilled = model.prefill(padding.slots, call)
                model.score(padding.slots, prefilled, call, [])
                model.first_tokens(padding.slots, prefilled, call, padding.settings)
        for layout in (layout for size in self._sizes for layout in self._layouts[size]):
            padding = call_rows(model, self._table, [layout], [])
            newest = None
            for _ in range(2):  # tokens of the host, and those of the step before
                call = padding.decoding_call(newest)
                chosen, _ = model.decode(padding.slots, call, padding.settings)
                newest = chosen.tokens
        model.begin_history(self.limits.max_rows, ())

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
        try:
            self._on_step()
        finally:
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
        """Dispatches a token of each row that decodes, and reads those of the last step."""
        if self._all_go_on() and all(map(self._give_room, self._table.rows)):
            before, calls = self._in_flight, self._calls_of(self._table.rows)
            self._in_flight = [
                self._decode(rows, last.chosen.tokens)
                for rows, last in zip(calls, before, strict=True)
            ]
            self._read(before)
            return
        self._read(self._in_flight)
        self._admit()
        decoding = self._with_room([row for row in self._table.rows if row.is_prefilled])
        prefilling = next((row for row in self._table.rows if not row.is_prefilled), None)
        if prefilling is not None:
            self._prefill(prefilling)
        self._in_flight = [self._decode(rows) for rows in self._calls_of(decoding)]
        self._remove_ended()
        self._on_step()  # first tokens, and scores of prompts

    def _all_go_on(self) -> bool:
        """True if the rows of the last step have a next one, alone, as far as is known."""
        rows = self._table.rows
        if self._queue_changed or not rows or rows != self._called:
            return False
        return all(row.goes_on for row in rows)

    def _read(self, in_flight: Sequence[_InFlight]) -> None:
        """Gives rows the tokens of a step, and removes those that have ended."""
        for call in in_flight:
            self._add_tokens(*call)
        self._remove_ended()
        if not self._table.rows:
            self._in_flight = []  # nobody waits for the step that was dispatched before
        self._on_step()  # before a part of a prompt is computed

    def _give_room(self, row: Row) -> bool:
        """Gives a row the block of its next token, if it needs one; False if none is free."""
        if self._table.has_room(row):
            return True
        self._calls = []  # their tables change
        return self._table.grow(row)

    def _with_room(self, rows: Sequence[Row]) -> list[Row]:
        """Gives rows the blocks of their next tokens; returns the rows that are left."""
        for row in rows:
            while row in self._table.rows and not self._give_room(row):
                self._preempt(self._table.rows[-1])
        return [row for row in rows if row in self._table.rows]

    def _preempt(self, row: Row) -> None:
        """Takes the row of an answer, which then waits before all others."""
        self._remove(row)
        self.preemptions += 1
        with self._changed:
            self._waiting.appendleft(row.answer)

    def _calls_of(self, rows: Sequence[Row]) -> list[CallRows]:
        """The calls that give each of these rows a token; equal rows have equal places in them."""
        if self._calls and rows == self._called:
            return self._calls
        names = [row.answer.request.adapter for row in rows]
        calls = []
        for indices in take_turns(self._model.methods, names, self._sizes[-1]):
            size = next(size for size in self._sizes if size >= len(indices))
            own = [rows[index] for index in indices]
            calls.append(call_rows(self._model, self._table, self._layouts[size], own))
        self._called, self._calls = list(rows), calls
        return calls

    def _remove_ended(self) -> None:
        for row in [r for r in self._table.rows if r.answer.is_ended or r.answer.is_cancelled]:
            self._remove(row)

    def _remove(self, row: Row) -> None:
        self._table.remove(row)
        self._called, self._calls = [], []

    def _admit(self) -> None:
        """Gives rows to waiting answers, in their order."""
        with self._changed:
            self._queue_changed = False
            for answer in [answer for answer in self._waiting if answer.is_cancelled]:
                self._waiting.remove(answer)
            while self._waiting:
                answer = self._waiting[0]
                row = self._table.add(answer)
                if row is None:
                    return
                self._waiting.popleft()
                if answer.request.has_penalties:
                    self._model.begin_history(row.slot, answer.request.tokens)

    def _prefill(self, row: Row) -> None:
        """Computes the next part of a row's prompt, and after the last one the first token."""
        request = row.answer.request
        left = request.tokens[row.cached :]
        chunk = next((c for c in self.limits.chunks if c >= len(left)), self.limits.chunks[-1])
        part = left[:chunk]
        layouts = self._layouts[self._model.prompt_rows]
        rows = call_rows(self._model, self._table, layouts, [row])
        call = rows.prompt_call([part], chunk)
        prefilled = self._model.prefill(rows.slots, call)
        if request.scores_prompt and row.answer.scored < len(request.tokens):
            begin = row.cached
            following = request.tokens[begin + 1 : begin + 1 + len(part)]
            scores = self._model.score(rows.slots, prefilled, call, following)
            wanted = request.logprobs or 0
            records = [scored_record(scores, place, wanted) for place in range(len(following))]
            if not all(np.isfinite(record.logprob or 0.0) for record in records):
                row.answer.fail(NOT_FINITE_MESSAGE)
                return
            if begin == 0:
                records.insert(0, TokenRecord(request.tokens[0]))
            known = row.answer.scored - (begin + 1 if begin else 0)  # by an earlier row
            with _failing_alone(row.answer):
                row.answer.add_prompt(records[known:])
        row.cached += len(part)
        if row.answer.is_ended or not row.is_prefilled:
            return
        if request.max_tokens == 0:
            row.answer.finish_prompt()
            return
        chosen = self._model.first_tokens(rows.slots, prefilled, call, rows.settings)
        self._add_tokens(rows, chosen, prefilled.routing)

    def _decode(self, rows: CallRows, newest: jax.Array | None = None) -> _InFlight:
        """Computes the next token of rows, after those of their answers or of an array [B]."""
        call = rows.decoding_call(newest)
        for row in rows.rows:
            row.cached += 1
        return _InFlight(rows, *self._model.decode(rows.slots, call, rows.settings))

    def _add_tokens(self, rows: CallRows, chosen: Chosen, routing: Mapping[str, Routed]) -> None:
        """Gives the rows of a call their new tokens."""
        tokens = np.asarray(chosen.tokens).tolist()
        requests = [row.answer.request for row in rows.rows]
        if any(request.logprobs is not None for request in requests):
            chosen = Chosen(*map(np.asarray, chosen))
        host_routing = {}
        if any(request.wants_routing for request in requests):
            host_routing = {name: Routed(*map(np.asarray, r)) for name, r in routing.items()}
        for place, row in enumerate(rows.rows):
            answer, token = row.answer, tokens[place]
            if answer.is_cancelled or answer.is_ended:
                continue
            if token == NOT_FINITE:
                answer.fail(NOT_FINITE_MESSAGE)
                continue
            row.chosen += 1
            if row.chosen <= len(answer.generated):  # an earlier row of the answer had it
                if row.chosen == len(answer.generated) and answer.request.has_penalties:
                    # Rounding may have chosen another token this time; those that were sent count.
                    self._model.begin_history(row.slot, answer.request.tokens, answer.generated)
                continue
            with _failing_alone(answer):
                record = TokenRecord(token)
                if answer.request.logprobs is not None:
                    record = chosen_record(chosen, place, answer.request.logprobs)
                if answer.request.wants_routing:
                    record = record._replace(routing=token_routing(rows.slots, host_routing, place))
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
