"""Text in, text out: prompts are batched, continued, and their tokens turned into text on the way.

Rows of a batch share its length and its compiled program, so prompts are taken by adapter and by
length. What a prompt is answered depends on neither: see `Request.number`.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.config.parse import require
from moe_jax.inference import generator as decoding
from moe_jax.inference.detokenise import Detokeniser
from moe_jax.inference.generator import Request
from moe_jax.inference.prompts import Prompt
from moe_jax.inference.sampling import SamplingConfig
from moe_jax.inference.stop_strings import StopStrings

Finish = Literal["stop", "length"]
"""Why an answer ended: by an end token or a stop string, or because it was long enough."""

MAX_NEW_TOKENS = 128
"""By default."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How prompts are answered.

    Attributes:
      sampling: how each token is picked.
      max_new_tokens: of an answer, at most.
      samples: answers to each prompt.
      stop: texts before which an answer ends; special tokens may be given by their text.
      seed: of what is drawn; the same one gives the same answers.

    Raises:
      ConfigError: a value is out of range.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_new_tokens: int = MAX_NEW_TOKENS
    samples: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        for name in ("max_new_tokens", "samples"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool)
            require(is_count and value > 0, name, f"must be a positive number, got {value!r}")
        require(
            self.samples == 1 or not self.sampling.is_greedy,
            "samples",
            f"with temperature 0 all {self.samples} would be the same; give a temperature",
        )
        is_seed = isinstance(self.seed, int) and 0 <= self.seed < 2**32
        require(is_seed, "seed", f"must be between 0 and 2**32 - 1, got {self.seed!r}")
        is_texts = isinstance(self.stop, tuple) and all(isinstance(s, str) for s in self.stop)
        require(is_texts, "stop", f"must be texts, got {self.stop!r}")
        require("" not in self.stop, "stop", "a stop string is empty, and would end every answer")


class Piece(NamedTuple):
    """What one step adds to an answer.

    Attributes:
      text: empty while a character or a possible stop string is not complete.
      finish: why the answer ends with it; None if it does not.
    """

    text: str
    finish: Finish | None


class Answer(NamedTuple):
    """An answer to a prompt.

    Attributes:
      prompt: the index of the prompt.
      sample: which of its answers.
      text: without stop string and special tokens.
      tokens: how many were generated, end token included.
      finish: why it ended.
    """

    prompt: int
    sample: int
    text: str
    tokens: int
    finish: Finish


class TextGenerator:
    """A generator of tokens and the tokenizer that goes with it."""

    def __init__(
        self,
        generator: decoding.Generator,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: frozenset[int],
        *,
        alone: bool = False,
        switch: int | None = None,
    ):
        """Joins the two.

        Args:
          generator: continues token ids.
          tokenizer: the base's own.
          end_ids: tokens that end an answer; see `end_tokens`.
          alone: whether an answer is decoded by itself, as other tools do: SentencePiece tokenizers
            then drop the blank it begins with, and half a character at its end becomes U+FFFD.
          switch: see `frequency_switch`; prompts of either side of it are batched apart.
        """
        self._generator = generator
        self._tokenizer = tokenizer
        self._end_ids = end_ids
        self._alone = alone
        self._switch = switch
        self._special = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }

    def answers(
        self, prompts: Sequence[Prompt], config: GenerationConfig, batch_size: int
    ) -> Iterator[list[Answer]]:
        """Answers all prompts, and gives the answers of each batch when it is finished.

        Args:
          prompts: checked by `check_prompts`.
          config: how.
          batch_size: answers that are written side by side.

        Raises:
          CheckpointError: the model's logits are not finite.
        """
        for rows in _batches(prompts, config.samples, batch_size, self._switch):
            requests = [_request(prompts, *row) for row in rows]
            texts = ["" for _ in rows]
            counts = [0 for _ in rows]
            ends: list[Finish] = ["length" for _ in rows]
            for pieces in self.pieces(requests, config):
                for row, piece in enumerate(pieces):
                    if piece is not None:
                        texts[row] += piece.text
                        counts[row] += 1
                        ends[row] = piece.finish or "length"
            yield [
                Answer(*row, text, count, end)
                for row, text, count, end in zip(rows, texts, counts, ends, strict=True)
            ]

    def stream(
        self, prompt: Prompt, config: GenerationConfig, number: int = 0
    ) -> Generator[Piece, None, None]:
        """Answers one prompt alone, `config.samples` aside, and gives the text while it comes.

        Args:
          prompt: checked by `check_prompts`.
          config: how.
          number: of the prompt among others, so that each draws something else.
        """
        request = Request(prompt.tokens, prompt.adapter, 0, number)
        for (piece,) in self.pieces([request], config):
            if piece is not None:
                yield piece

    def pieces(
        self, requests: Sequence[Request], config: GenerationConfig
    ) -> Iterator[list[Piece | None]]:
        """Answers requests side by side, and gives what each step adds; None to finished rows.

        Raises:
          CheckpointError: the model's logits are not finite.
        """
        stops = [text for text in config.stop if text not in self._special]
        end_ids = self._end_ids | {self._special[t] for t in config.stop if t in self._special}
        rows = [
            _Row(Detokeniser(self._tokenizer, before), StopStrings(stops), end_ids, self._alone)
            for before in (() if self._alone else request.tokens for request in requests)
        ]
        written: list[list[int]] = [[] for _ in requests]
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
                written[row].append(token)
                rows[row].read(written[row])
                pieces.append(rows[row].take(is_last=len(written[row]) == config.max_new_tokens))
            yield pieces


class _Row:
    """The text of one answer while it is written."""

    def __init__(
        self,
        detokeniser: Detokeniser,
        stops: StopStrings,
        end_ids: frozenset[int],
        keeps_halves: bool,
    ):
        self._detokeniser = detokeniser
        self._stops = stops
        self._end_ids = end_ids
        self._keeps_halves = keeps_halves
        self._read = 0
        self._text = ""
        self._is_ended = False

    def read(self, tokens: Sequence[int]) -> bool:
        """Reads those of the row's tokens that it has not seen yet; whether a stop string ends it.

        The generator asks for this while it decodes, before it gives the token to others.
        """
        for token in tokens[self._read :]:
            self._read += 1
            if token in self._end_ids:
                self._is_ended = True
            else:
                self._text += self._stops.push(self._detokeniser.push(token))
        return self._stops.found is not None

    def take(self, *, is_last: bool) -> Piece:
        """The text that came since it was taken before; all of it where the answer ends."""
        if self._stops.found is None and (self._is_ended or is_last):
            is_cut = not self._is_ended and not self._keeps_halves
            rest = self._detokeniser.finish(is_cut=is_cut)
            self._text += self._stops.push(rest) + self._stops.finish()
        text, self._text = self._text, ""
        if self._is_ended or self._stops.found is not None:
            return Piece(text, "stop")
        return Piece(text, "length" if is_last else None)


def _request(prompts: Sequence[Prompt], prompt: int, sample: int) -> Request:
    tokens, adapter, _ = prompts[prompt]
    return Request(tokens, adapter, sample, prompt)


def _batches(
    prompts: Sequence[Prompt], samples: int, batch_size: int, switch: int | None
) -> Iterator[list[tuple[int, int]]]:
    """The prompt and the sample of each row of each batch."""
    order = sorted(
        range(len(prompts)),
        key=lambda i: (prompts[i].adapter is not None, prompts[i].adapter, -len(prompts[i].tokens)),
    )
    is_beyond = [switch is not None and len(prompt.tokens) > switch for prompt in prompts]
    for side in (True, False):
        own = [prompt for prompt in order if is_beyond[prompt] == side]
        rows = [(prompt, sample) for prompt in own for sample in range(samples)]
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]
