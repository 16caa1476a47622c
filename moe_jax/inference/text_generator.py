"""Generation of text: batches of prompts, their continuation and incremental detokenization.

Rows of a batch share its length and its compiled program, so prompts are batched by adapter and
length. Answers depend on neither: see `Request.number`.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.inference.generator import Request, TokenGenerator
from moe_jax.inference.prompts import Prompt
from moe_jax.inference.settings import GenerationConfig
from moe_jax.inference.stopping import StopStrings, divide_stops, special_tokens

FinishReason = Literal["stop", "length"]
"""`stop`: an end token or a stop string; `length`: the largest number of tokens."""

_REPLACEMENT = "\ufffd"
"""Result of decoding bytes that are no complete character; more bytes may complete it."""


class Piece(NamedTuple):
    """Text that one step adds to an answer.

    Attributes:
      text: empty while a character or a possible stop string is incomplete.
      finish: finish reason if the answer ends with this piece; otherwise None.
    """

    text: str
    finish: FinishReason | None


class Answer(NamedTuple):
    """Answer to a prompt.

    Attributes:
      prompt: index of the prompt.
      sample: index among the answers to this prompt.
      text: text without the stop string and special tokens.
      tokens: number of generated tokens, including the end token.
      finish: finish reason.
    """

    prompt: int
    sample: int
    text: str
    tokens: int
    finish: FinishReason


class TextGenerator:
    """A token generator and its tokenizer."""

    def __init__(
        self,
        generator: TokenGenerator,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        *,
        decode_without_prompt: bool = False,
        switch_length: int | None = None,
    ):
        """Combines the two.

        Args:
          generator: generator of token ids.
          tokenizer: tokenizer of the base.
          end_ids: token ids that end an answer; see `end_tokens`.
          decode_without_prompt: decode answers without their prompt, as other tools do.
            SentencePiece tokenizers then drop a leading space, and half a character at the end
            becomes U+FFFD.
          switch_length: from `frequency_switch`; prompts on different sides of it are batched
            separately.
        """
        self._generator = generator
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._decode_without_prompt = decode_without_prompt
        self._switch_length = switch_length
        self._special = special_tokens(tokenizer)

    def answers(
        self, prompts: Sequence[Prompt], config: GenerationConfig, batch_size: int
    ) -> Iterator[list[Answer]]:
        """Answers all prompts; yields the answers of each batch when it is complete.

        Args:
          prompts: prompts that `check_prompts` accepts.
          config: settings of generation.
          batch_size: number of answers that are generated side by side.

        Raises:
          CheckpointError: the model's logits are not finite.
        """
        for rows in _batches(prompts, config.samples, batch_size, self._switch_length):
            requests = [
                Request(prompts[prompt].tokens, prompts[prompt].adapter, sample, prompt)
                for prompt, sample in rows
            ]
            texts = ["" for _ in rows]
            counts = [0 for _ in rows]
            reasons: list[FinishReason] = ["length" for _ in rows]
            for pieces in self._pieces(requests, config):
                for row, piece in enumerate(pieces):
                    if piece is not None:
                        texts[row] += piece.text
                        counts[row] += 1
                        reasons[row] = piece.finish or "length"
            yield [
                Answer(*row, text, count, reason)
                for row, text, count, reason in zip(rows, texts, counts, reasons, strict=True)
            ]

    def stream(
        self, prompt: Prompt, config: GenerationConfig, number: int = 0
    ) -> Generator[Piece, None, None]:
        """Answers one prompt once, whatever `config.samples`; yields the text as it is generated.

        Args:
          prompt: prompt that `check_prompts` accepts.
          config: settings of generation.
          number: see `Request.number`.
        """
        request = Request(prompt.tokens, prompt.adapter, 0, number)
        for (piece,) in self._pieces([request], config):
            if piece is not None:
                yield piece

    def _pieces(
        self, requests: Sequence[Request], config: GenerationConfig
    ) -> Iterator[list[Piece | None]]:
        """Answers requests side by side; yields the pieces of each step, None for ended rows."""
        stops, stop_ids = divide_stops(config.stop, self._special)
        end_ids = self._end_ids | stop_ids
        rows = [
            AnswerText(
                Detokenizer(self._tokenizer, before),
                StopStrings(stops),
                end_ids,
                self._decode_without_prompt,
            )
            for before in (
                () if self._decode_without_prompt else request.tokens for request in requests
            )
        ]
        generated: list[list[int]] = [[] for _ in requests]
        steps = self._generator.stream(
            requests,
            config.sampling,
            max_new_tokens=config.max_new_tokens,
            eos_ids=end_ids,
            seed=config.seed,
            stop=lambda row, tokens: rows[row].read(tokens),
        )
        for step in steps:
            pieces: list[Piece | None] = []
            for row, token in enumerate(step):
                if token is None:
                    pieces.append(None)
                    continue
                generated[row].append(token)
                rows[row].read(generated[row])
                pieces.append(rows[row].take(is_last=len(generated[row]) == config.max_new_tokens))
            yield pieces


class Detokenizer:
    """Incremental conversion of the tokens after a prompt to text.

    Tokens are decoded together with those before them, because the text of a token depends on its
    neighbors: a character may be spread over several tokens, and SentencePiece tokenizers drop a
    leading space. Only the tokens since the last piece of text are decoded again, so that the cost
    of a token does not grow with the text. Special tokens have no text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]):
        """Starts after a prompt; its own text is not part of the output.

        Args:
          tokenizer: tokenizer of the base.
          prompt: token ids of the prompt.
        """
        self._tokenizer = tokenizer
        self._window = list(prompt)
        self._known = len(self._window)  # tokens of the window whose text was returned already
        self._text = self._decode()

    def push(self, token: int) -> str:
        """Adds a token; returns the new text, empty while a character is incomplete."""
        self._window.append(token)
        whole = self._decode()
        return "" if whole.endswith(_REPLACEMENT) else self._advance(whole)

    def finish(self, *, is_cut: bool) -> str:
        """Returns the text held back.

        Args:
          is_cut: the answer was cut off, so half a character is dropped. Otherwise it becomes
            U+FFFD.
        """
        whole = self._decode()
        return self._advance(whole.rstrip(_REPLACEMENT) if is_cut else whole)

    def _advance(self, whole: str) -> str:
        new = whole[len(self._text) :]
        if new:
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._text = self._decode()
        return new

    def _decode(self) -> str:
        text = self._tokenizer.decode(
            self._window, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class AnswerText:
    """Text of one answer while it is generated."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings,
        end_ids: frozenset[int],
        keeps_partial_character: bool = False,
    ):
        """Starts an empty answer.

        Args:
          detokenizer: detokenizer after the prompt.
          stops: stop strings of the answer.
          end_ids: token ids that end it.
          keeps_partial_character: half a character at the end becomes U+FFFD, and is not dropped.
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._end_ids = end_ids
        self._keeps_partial_character = keeps_partial_character
        self._read = 0
        self._text = ""
        self._is_ended = False

    def read(self, tokens: Sequence[int]) -> bool:
        """Adds those of the row's tokens that are new; returns True if a stop string ends it.

        The token generator calls this before it yields the token, so a token arrives twice.
        """
        for token in tokens[self._read :]:
            self._read += 1
            if token in self._end_ids:
                self._is_ended = True
            else:
                self._text += self._stops.push(self._detokenizer.push(token))
        return self._stops.matched is not None

    def take(self, *, is_last: bool) -> Piece:
        """Returns the text since the last call; all of it where the answer ends."""
        if self._stops.matched is None and (self._is_ended or is_last):
            is_cut = not self._is_ended and not self._keeps_partial_character
            rest = self._detokenizer.finish(is_cut=is_cut)
            self._text += self._stops.push(rest) + self._stops.finish()
        text, self._text = self._text, ""
        if self._is_ended or self._stops.matched is not None:
            return Piece(text, "stop")
        return Piece(text, "length" if is_last else None)


def _batches(
    prompts: Sequence[Prompt], samples: int, batch_size: int, switch_length: int | None
) -> Iterator[list[tuple[int, int]]]:
    """Yields batches of (prompt, sample) indices."""
    order = sorted(
        range(len(prompts)),
        key=lambda i: (prompts[i].adapter is not None, prompts[i].adapter, -len(prompts[i].tokens)),
    )
    is_beyond = [
        switch_length is not None and len(prompt.tokens) > switch_length for prompt in prompts
    ]
    for side in (True, False):
        rows = [(i, sample) for i in order if is_beyond[i] == side for sample in range(samples)]
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]
