"""The models of a server by name, and requests as answers of the engine."""

import asyncio
import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterMethod
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import suggest
from moe_jax.data.chat_template import ChatTemplate, end_of_turn
from moe_jax.data.tokenizer import encode, encode_prompt
from moe_jax.data.values import check_text
from moe_jax.errors import ConfigError, DataError
from moe_jax.inference.limits import check_prompts
from moe_jax.inference.stopping import divide_stops, special_tokens
from moe_jax.serving.answer import AnswerEvent, AnswerRequest, OngoingAnswer
from moe_jax.serving.engine import ClosedError, Engine, QueueFullError
from moe_jax.serving.fields import ApiError
from moe_jax.serving.metrics import Metrics
from moe_jax.serving.protocol import (
    CHAT_TOKENS,
    ChatRequest,
    CompletionRequest,
    RequestSettings,
)

COMPLETION_TOKENS = 16
"""Default of `max_tokens` in completions, as in OpenAI's API."""

Sink = Callable[[int, AnswerEvent], None]
"""Receives the index of an answer in its request and an event of it."""


class RequestPrompt(NamedTuple):
    """A prompt of a request.

    Attributes:
      tokens: token ids.
      text: the prompt as text, for `echo`.
    """

    tokens: tuple[int, ...]
    text: str


class Prepared(NamedTuple):
    """A request that is checked and tokenized.

    Attributes:
      prompts: its prompts.
      requests: its answers, those to one prompt side by side.
    """

    prompts: tuple[RequestPrompt, ...]
    requests: tuple[AnswerRequest, ...]


class Service:
    """The models of a server.

    Attributes:
      engine: computes the answers.
      metrics: numbers of the server.
      tokenizer: tokenizer of the base; used by one thread at a time.
      is_draining: true if requests are refused, since the server ends.
    """

    def __init__(
        self,
        base: str,
        config: ModelConfig,
        adapters: Mapping[str, AdapterMethod],
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        engine: Engine,
        metrics: Metrics,
    ):
        """Describes the models.

        Args:
          base: name of the base.
          config: architecture of the base.
          adapters: method of each adapter, by name.
          tokenizer: tokenizer of the base.
          end_ids: token ids that end an answer.
          engine: engine of these models.
          metrics: numbers of the server.
        """
        self.engine = engine
        self.metrics = metrics
        self.tokenizer = tokenizer
        self.is_draining = False
        self._base = base
        self._config = config
        self._adapters = dict(adapters)
        self._end_ids = end_ids
        self._has_template = bool(tokenizer.chat_template)
        turn = end_of_turn(tokenizer) if self._has_template else None
        self._chat_end_ids = end_ids | (frozenset() if turn is None else {turn})
        self._special = special_tokens(tokenizer)
        self._created = int(time.time())
        self._max_characters = engine.limits.max_length * max(map(len, tokenizer.get_vocab()))
        self._to_set: dict[asyncio.AbstractEventLoop, set[asyncio.Event]] = {}
        # Tokenizers keep state between calls; the engine's thread decodes with a copy.
        self._decoder = copy.deepcopy(tokenizer)

    def models(self) -> list[dict[str, Any]]:
        """The objects of `/v1/models`."""
        return [self.model(name) for name in (self._base, *self._adapters)]

    def model(self, name: str) -> dict[str, Any]:
        """The object of one model.

        Raises:
          ApiError: there is no such model.
        """
        adapter = self._adapter(name)
        method = None if adapter is None else self._adapters[adapter]
        experts = getattr(method, "num_experts", None)
        router = getattr(method, "router", None)
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "moe_jax",
            "moe_jax": {
                "kind": "base" if method is None else "adapter",
                "method": None if method is None else METHODS.name_of(method),
                "num_experts": max(experts) if isinstance(experts, tuple) else experts,
                "top_k": getattr(router, "top_k", None),
                "num_layers": self._config.num_layers,
                "chat": self._has_template,
                "max_length": self.engine.limits.max_length,
            },
        }

    def prepare_completion(self, request: CompletionRequest) -> Prepared:
        """Tokenizes and checks the prompts of `/v1/completions`.

        Raises:
          ApiError: the model is unknown, or a prompt is too long or has unknown tokens.
        """
        adapter = self._adapter(request.model)
        prompts = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                self._check_text(prompt, "prompt")
                prompts.append(RequestPrompt(tuple(encode_prompt(self.tokenizer, prompt)), prompt))
            else:
                prompts.append(RequestPrompt(prompt, ""))
        limit = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        self._check(prompts, adapter, limit, "prompt")
        if request.echo:
            prompts = [
                prompt if prompt.text else prompt._replace(text=self._decoded(prompt.tokens))
                for prompt in prompts
            ]
        scores = request.echo and request.logprobs is not None
        return self._prepared(request, prompts, adapter, limit, self._end_ids, scores)

    def prepare_chat(self, request: ChatRequest) -> Prepared:
        """Renders, tokenizes and checks a conversation.

        Raises:
          ApiError: the model is unknown or has no chat template, the template refuses the
            conversation, or it is too long.
        """
        adapter = self._adapter(request.model)
        if not self._has_template:
            raise ApiError(
                400,
                f"model: {request.model!r} has no chat template; use /v1/completions",
                param="model",
            )
        arguments = {} if request.tools is None else {"tools": request.tools}
        template = ChatTemplate(self.tokenizer, "messages", arguments=arguments)
        try:
            text = template.render(request.messages, answer_follows=True)
        except DataError as error:
            raise ApiError(400, str(error), param="messages") from None
        self._check_text(text, "messages")
        prompt = RequestPrompt(tuple(encode(self.tokenizer, [text])[0]), text)
        room = self.engine.limits.max_length - len(prompt.tokens)
        limit = max(1, min(CHAT_TOKENS, room)) if request.max_tokens is None else request.max_tokens
        self._check([prompt], adapter, limit, "messages")
        return self._prepared(request, [prompt], adapter, limit, self._chat_end_ids, False)

    def submit(self, prepared: Prepared, sink: Sink) -> list[OngoingAnswer]:
        """Queues the answers of a request.

        Args:
          prepared: the request.
          sink: receives the events, in the engine's thread.

        Raises:
          ApiError: the queue is full, or the server ends.
        """
        answers = [
            OngoingAnswer(request, self._decoder, lambda event, index=index: sink(index, event))
            for index, request in enumerate(prepared.requests)
        ]
        self.refuse_if_draining()
        try:
            self.engine.submit(answers)
        except QueueFullError:
            raise _queue_full() from None
        except ClosedError:
            raise ApiError(503, "the server is shutting down") from None
        self.metrics.prompt_tokens.inc(sum(len(prompt.tokens) for prompt in prepared.prompts))
        return answers

    def start(self, on_end: Callable[[], None]) -> None:
        """Starts the engine; see `Engine.start`."""
        self.engine.start(self._end_step, on_end)

    def set_after_step(self, loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
        """Sets an event of a loop when the engine's step ends. For the engine's thread.

        A loop is woken once for all events, since each wake-up interrupts the engine's thread.
        """
        self._to_set.setdefault(loop, set()).add(event)

    def _end_step(self) -> None:
        to_set, self._to_set = self._to_set, {}
        for loop, events in to_set.items():
            # A loop that has ended has no readers, and its server ends the engine.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set_all, events)

    def refuse_if_full(self, request: RequestSettings, encoding: int) -> None:
        """Refuses a request that has no place in the queue, before it is tokenized.

        Args:
          request: the request.
          encoding: number of answers of requests that are being tokenized.

        Raises:
          ApiError: the queue is too small for it, or full.
        """
        count, limit = request.num_answers, self.engine.limits.max_queue
        if count > limit:
            raise ApiError(
                400,
                f"a request may ask for at most {limit} answers, got {count}",
                param="n" if request.n > 1 else "prompt",
            )
        if self.engine.waiting + encoding + count > limit:
            raise _queue_full()

    def refuse_if_draining(self) -> None:
        """Refuses a request of a server that ends.

        Raises:
          ApiError: the server ends.
        """
        if self.is_draining:
            raise ApiError(503, "the server is shutting down")

    def _adapter(self, name: str) -> str | None:
        if name == self._base:
            return None
        if name not in self._adapters:
            known = suggest(name, (self._base, *self._adapters))
            raise ApiError(
                404,
                f"model: {name[:80]!r} does not exist; {known}",
                param="model",
                code="model_not_found",
            )
        return name

    def _check_text(self, text: str, param: str) -> None:
        """Refuses a text that cannot be tokenized, or is too long whatever its tokens are."""
        if len(text) > self._max_characters:
            raise ApiError(
                400,
                f"{param}: {len(text)} characters are more than {self.engine.limits.max_length} "
                "tokens have",
                param=param,
                code="context_length_exceeded",
            )
        try:
            check_text(text, param)
        except DataError as error:
            raise ApiError(400, str(error), param=param) from None

    def _check(
        self, prompts: Sequence[RequestPrompt], adapter: str | None, limit: int, param: str
    ) -> None:
        """Refuses prompts that cannot be answered, before they wait for a row."""
        length = self.engine.limits.max_length
        several = len(prompts) > 1
        try:
            check_prompts(
                [
                    (prompt.tokens, adapter, f"{param}[{index}]" if several else param)
                    for index, prompt in enumerate(prompts)
                ],
                max_new_tokens=limit,
                context=length,
                vocab_size=self._config.vocab_size,
                adapters=self._adapters,
            )
        except (DataError, ConfigError) as error:
            is_long = any(len(prompt.tokens) + limit > length for prompt in prompts)
            code = "context_length_exceeded" if is_long else None
            raise ApiError(400, str(error), param=param, code=code) from None

    def _prepared(
        self,
        request: RequestSettings,
        prompts: Sequence[RequestPrompt],
        adapter: str | None,
        limit: int,
        end_ids: frozenset[int],
        scores_prompt: bool,
    ) -> Prepared:
        stops, stop_ids = divide_stops(request.stop, self._special)
        same = (
            "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty", "seed", "logprobs",
        )  # fmt: skip
        settings = {name: getattr(request, name) for name in same}
        first = AnswerRequest(
            tokens=(),
            adapter=adapter,
            max_tokens=limit,
            stop=tuple(stops),
            end_ids=end_ids | stop_ids,
            scores_prompt=scores_prompt,
            wants_routing=request.routing,
            **settings,
        )
        requests = [
            dataclasses.replace(first, tokens=prompt.tokens, sample=sample)
            for prompt in prompts
            for sample in range(request.n)
        ]
        return Prepared(tuple(prompts), tuple(requests))

    def _decoded(self, tokens: Sequence[int]) -> str:
        text = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


def _set_all(events: Iterable[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _queue_full() -> ApiError:
    return ApiError(429, "the queue is full; try again later", code="rate_limit_exceeded")
