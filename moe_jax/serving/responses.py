"""Answers into OpenAI's objects, whole or as chunks of a stream."""

import functools
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moe_jax.serving.answer import AnswerEvent, TokenRecord
from moe_jax.serving.protocol import ChatRequest, CompletionRequest, RequestSettings
from moe_jax.serving.service import Prepared

_INCOMPLETE = "\ufffd"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # of SentencePiece
_BYTE_LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of GPT-2 and later


class TokenTexts:
    """Text of single tokens, as they stand inside a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Takes a tokenizer that no other thread uses."""
        self._tokenizer = tokenizer
        anchor = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        self._anchor = list(anchor)[-1:]
        self._before = self._decode(self._anchor)
        self.of = functools.lru_cache(maxsize=65536)(self._text)

    def _text(self, token: int) -> str:
        """Text of a token; `token_id:N` if it is a part of a character."""
        # SentencePiece drops the space of a text's first token.
        text = self._decode([*self._anchor, token])
        text = text.removeprefix(self._before)
        return f"token_id:{token}" if _INCOMPLETE in text else text

    def bytes_of(self, token: int) -> list[int] | None:
        """Bytes of a token, of a part of a character too; None if the vocabulary hides them."""
        text = self.of(token)
        if not text.startswith("token_id:"):
            return list(text.encode())
        piece = self._tokenizer.convert_ids_to_tokens(token)
        assert isinstance(piece, str)
        if found := _BYTE_PIECE.fullmatch(piece):
            return [int(found[1], 16)]
        if not all(letter in _BYTE_LETTERS for letter in piece):
            return None
        return [_BYTE_LETTERS[letter] for letter in piece]

    def _decode(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class ResponseWriter:
    """Objects for the answers of one request.

    Attributes:
      generated: number of tokens of each answer so far.
    """

    def __init__(self, request: RequestSettings, prepared: Prepared, texts: TokenTexts):
        """Starts a response without answers."""
        self.generated = [0] * len(prepared.requests)
        self._request = request
        self._prepared = prepared
        self._texts = texts
        self._is_chat = isinstance(request, ChatRequest)
        kind = "chatcmpl" if self._is_chat else "cmpl"
        self._common = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }
        self._offsets = [0] * len(prepared.requests)
        self._has_begun = [False] * len(prepared.requests)

    def whole(self, events: Sequence[Sequence[AnswerEvent]]) -> dict[str, Any]:
        """The response with all answers, from all events of each."""
        choices = []
        for index, own in enumerate(events):
            merged = AnswerEvent(
                text="".join(event.text for event in own),
                tokens=tuple(token for event in own for token in event.tokens),
                prompt=tuple(token for event in own for token in event.prompt),
                finish=own[-1].finish,
                length=own[-1].length,
            )
            choices.append(self._choice(index, merged, key="message"))
        name = "chat.completion" if self._is_chat else "text_completion"
        return {**self._common, "object": name, "choices": choices, "usage": self._usage()}

    def chunk(self, index: int, event: AnswerEvent) -> dict[str, Any]:
        """The chunk of a stream for one event of the answer `index`."""
        return self._chunk([self._choice(index, event, key="delta")])

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream, with the number of tokens."""
        return {**self._chunk([]), "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        chunk = {**self._common, "object": name, "choices": choices}
        return {**chunk, "usage": None} if self._request.include_usage else chunk

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(prompt.tokens) for prompt in self._prepared.prompts)
        generated = sum(self.generated)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }

    def _choice(self, index: int, event: AnswerEvent, key: str) -> dict[str, Any]:
        self.generated[index] = max(self.generated[index], event.length)
        is_first, self._has_begun[index] = not self._has_begun[index], True
        choice: dict[str, Any] = {"index": index, "finish_reason": event.finish}
        if self._is_chat:
            message = {"role": "assistant"} if is_first else {}
            choice[key] = {**message, "content": event.text}
            choice["logprobs"] = self._chat_logprobs(event)
        else:
            request, text = self._request, event.text
            assert isinstance(request, CompletionRequest)
            if request.echo and is_first:
                text = self._prepared.prompts[index // request.n].text + text
            choice |= {"text": text, "logprobs": self._logprobs(index, event)}
        if self._request.routing:
            choice["moe_jax"] = {"tokens": [*map(_routing, event.tokens)]}
        return choice

    def _logprobs(self, index: int, event: AnswerEvent) -> dict[str, Any] | None:
        """Log-probabilities of a completion; those of an echoed prompt come first."""
        count = self._request.logprobs
        records = [*event.prompt, *event.tokens]
        if count is None or not records:
            return None
        offsets = []
        for record in records:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(record.text)
        return {
            "tokens": [self._texts.of(record.id) for record in records],
            "token_logprobs": [record.logprob for record in records],
            "top_logprobs": [self._top(record) for record in records] if count else None,
            "text_offset": offsets,
        }

    def _top(self, record: TokenRecord) -> dict[str, float] | None:
        """The most probable tokens, and the token itself; None without any before it."""
        if record.logprob is None:
            return None
        pairs = self._with_names([*record.top, (record.id, record.logprob)])
        return dict(pairs)

    def _chat_logprobs(self, event: AnswerEvent) -> dict[str, Any] | None:
        if self._request.logprobs is None or not event.tokens:
            return None
        content = []
        for record in event.tokens:
            top = [self._chat_token(*pair) for pair in record.top]
            content.append({**self._chat_token(record.id, record.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _chat_token(self, token: int, logprob: float | None) -> dict[str, Any]:
        encoded = self._texts.bytes_of(token)
        return {"token": self._texts.of(token), "logprob": logprob, "bytes": encoded}

    def _with_names(self, pairs: Iterable[tuple[int, float]]) -> list[tuple[str, float]]:
        """Texts and log-probabilities of tokens; of equal texts the first keeps it."""
        named: dict[str, tuple[int, float]] = {}
        for token, logprob in pairs:
            text = self._texts.of(token)
            if named.setdefault(text, (token, logprob))[0] != token:
                named[f"token_id:{token}"] = (token, logprob)
        return [(text, logprob) for text, (_, logprob) in named.items()]


def _routing(record: TokenRecord) -> dict[str, Any]:
    routing = record.routing
    return {
        "id": record.id,
        "text": record.text,
        "experts": None if routing is None else routing.experts,
        "weights": None if routing is None else routing.weights,
    }
