"""One answer to one prompt: what is asked for, and its tokens as text and events."""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.inference.stopping import StopStrings
from moe_jax.inference.text_generator import AnswerText, Detokenizer, FinishReason


class TokenExperts(NamedTuple):
    """Experts that served a token, and their weights, layer by layer."""

    experts: list[list[int]]
    weights: list[list[float]]


class TokenRecord(NamedTuple):
    """A token of an answer or a prompt.

    Attributes:
      id: token id.
      logprob: its log-probability in nats; None for the first token of a prompt, and where the
        request does not want it.
      top: ids and log-probabilities of the most probable tokens.
      routing: routing in the pass that chose it; None where the request does not want it, and
        without routers.
      text: its text, where the request wants log-probabilities or the routing; empty while a
        character is incomplete.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    routing: TokenExperts | None = None
    text: str = ""


class AnswerEvent(NamedTuple):
    """Addition of a step to an answer.

    Attributes:
      text: new text; empty while a character or a possible stop string is incomplete.
      tokens: new tokens.
      prompt: tokens of the prompt, in the first event of requests that want their scores.
      finish: finish reason in the last event.
      error: message in the last event of an answer that failed.
      status: its HTTP status.
      length: number of tokens of the answer so far.
    """

    text: str = ""
    tokens: tuple[TokenRecord, ...] = ()
    prompt: tuple[TokenRecord, ...] = ()
    finish: FinishReason | None = None
    error: str | None = None
    status: int = 500
    length: int = 0

    @property
    def is_last(self) -> bool:
        """True if no event follows."""
        return self.finish is not None or self.error is not None


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """Prompt and settings of one answer, checked.

    Attributes:
      tokens: token ids of the prompt.
      adapter: name of the adapter; None is the base.
      max_tokens: largest number of tokens of the answer; 0 only scores the prompt.
      temperature, top_k, top_p, min_p, repetition_penalty: see `SamplingConfig`.
      presence_penalty, frequency_penalty: see `RowSettings`.
      seed: random seed.
      sample: index among the answers to the same prompt.
      stop: strings before which the answer ends.
      end_ids: token ids that end it.
      logprobs: number of alternatives for each token; None for no log-probabilities.
      scores_prompt: whether the log-probabilities of the prompt's tokens are wanted.
      wants_routing: whether the routing of the answer's tokens is wanted.
    """

    tokens: tuple[int, ...]
    adapter: str | None = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    sample: int = 0
    stop: tuple[str, ...] = ()
    end_ids: frozenset[int] = field(default_factory=frozenset)
    logprobs: int | None = None
    scores_prompt: bool = False
    wants_routing: bool = False

    @property
    def total_length(self) -> int:
        """Largest number of tokens of prompt and answer."""
        return len(self.tokens) + self.max_tokens

    @property
    def has_penalties(self) -> bool:
        """True if earlier tokens change the choice of the next."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


class OngoingAnswer:
    """An answer while it is computed. The engine's thread calls everything but `cancel`.

    Attributes:
      request: what is asked for.
      generated: its tokens so far.
      created: time of the request, of `time.perf_counter`.
      latest: time of the latest token.
      scored: number of tokens of the prompt whose scores are known.
    """

    def __init__(
        self,
        request: AnswerRequest,
        tokenizer: PreTrainedTokenizerBase,
        sink: Callable[[AnswerEvent], None],
    ):
        """Starts an answer without tokens.

        Args:
          request: what is asked for.
          tokenizer: tokenizer of the base; used by the engine's thread.
          sink: receives the events; called by the engine's thread, and must not wait.
        """
        self.request = request
        self.generated: list[int] = []
        self.created = self.latest = time.perf_counter()
        self._tokenizer = tokenizer
        self._sink = sink
        self.scored = 0
        self._prompt: tuple[TokenRecord, ...] = ()
        self._cancelled = threading.Event()
        self.is_ended = False

    # These decode the whole prompt, so that the engine's thread makes them, and no other.

    @functools.cached_property
    def _text(self) -> AnswerText:
        detokenizer = Detokenizer(self._tokenizer, self.request.tokens)
        return AnswerText(detokenizer, StopStrings(self.request.stop), self.request.end_ids)

    @functools.cached_property
    def _token_texts(self) -> Detokenizer:
        before = () if self.request.scores_prompt else self.request.tokens
        return Detokenizer(self._tokenizer, before)

    @property
    def is_cancelled(self) -> bool:
        """True if nobody waits for it any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ends the answer before its next token. For any thread."""
        self._cancelled.set()

    def add_prompt(self, scores: Sequence[TokenRecord]) -> None:
        """Adds scores of the next tokens of the prompt."""
        for record in scores:
            text = self._token_texts.push(record.id)
            self._prompt += (record._replace(text=text),)
        self.scored += len(scores)

    def finish_prompt(self) -> None:
        """Ends an answer without tokens."""
        self._send(AnswerEvent(prompt=self._prompt, finish="length"))

    def add_token(self, record: TokenRecord) -> None:
        """Adds a token, and sends what it makes known."""
        self.generated.append(record.id)
        self.latest = time.perf_counter()
        self._text.read(self.generated)
        text, finish = self._text.take(is_last=len(self.generated) == self.request.max_tokens)
        wants_tokens = self.request.logprobs is not None or self.request.wants_routing
        if wants_tokens:
            token_text = self._token_texts.push(record.id)
            if finish:
                is_cut = record.id not in self.request.end_ids
                token_text += self._token_texts.finish(is_cut=is_cut)
            record = record._replace(text=token_text)
        if text or finish or wants_tokens or self._prompt:
            tokens = (record,)
            self._send(AnswerEvent(text, tokens, self._prompt, finish, length=len(self.generated)))
            self._prompt = ()

    def fail(self, message: str, status: int = 500) -> None:
        """Ends the answer with an error of this HTTP status, unless it has ended."""
        if not self.is_ended:
            self._send(AnswerEvent(error=message, status=status))

    def _send(self, event: AnswerEvent) -> None:
        self.is_ended = event.is_last
        self._sink(event)
