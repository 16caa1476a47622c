"""End of an answer: end tokens and stop strings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_jax.errors import CheckpointError
from moe_jax.files.json_file import read_json_object
from moe_jax.hf.wrapper import GROUP

_FIELD = "eos_token_id"


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end an answer of the base in `folder`.

    They are those of `generation_config.json` and `config.json`, at which transformers stops, and
    the tokenizer's end-of-text token, which training puts after a completion.

    Returns:
      The ids; empty if no file names any, so that only the length ends an answer.

    Raises:
      CheckpointError: a file is unreadable, or its `eos_token_id` is invalid.
    """
    ids = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        fields = read_json_object(file)
        for group in (fields, fields.get(GROUP)):
            if isinstance(group, dict):
                ids |= _ids(group.get(_FIELD), file)
    return frozenset(ids)


def _ids(value: Any, file: Path) -> set[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(
                f"{file}: {_FIELD}: expected a token id or a list of them, got {value!r}"
            )
    return set(ids)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of a tokenizer's special tokens, by their text."""
    return {
        token.content: token_id
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }


def divide_stops(
    stops: Sequence[str], special: Mapping[str, int]
) -> tuple[list[str], frozenset[int]]:
    """Stop strings to look for in the text, and ids of those that are special tokens.

    Args:
      stops: stop strings of a request.
      special: see `special_tokens`; these have no text.
    """
    texts = [text for text in stops if text not in special]
    return texts, frozenset(special[text] for text in stops if text in special)


class StopStrings:
    """Filter that passes a stream of text on up to the first stop string.

    Text that may be the beginning of a stop string is held back, so no part of a stop string is
    passed on. If several stop strings occur, the one that is complete first ends the text. The
    output does not depend on how the text is split into pieces.

    Attributes:
      matched: stop string that ended the text; None before that.
    """

    def __init__(self, stops: Sequence[str]):
        """Starts an empty text; `stops` are not empty strings."""
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Adds a piece of text; returns the text that is safe to pass on."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if matches:
            _, start, self.matched = min(matches)
            self._held = ""
            return text[:start]
        keep = len(text) - self._partial_match(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Returns the text held back; call it when the text is complete."""
        held, self._held = self._held, ""
        return held

    def _partial_match(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
