"""The text that each token of a row stands for."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
_CONTEXT = 4
"""Tokens in front that decide how a token reads: SentencePiece drops the blank of the first."""


def token_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """One text for each token; joined, they are the decoded row.

    Tokens that hold a part of a character (bytes of an emoji) have an empty text, and the one that
    completes the character has all of it.
    """

    def decode(start: int, stop: int) -> str:
        text = tokenizer.decode(list(tokens[start:stop]), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    pieces: list[str] = []
    done = 0  # tokens before this one are written out
    for index in range(len(tokens)):
        start = max(0, done - _CONTEXT)
        before, now = decode(start, done), decode(start, index + 1)
        is_last = index + 1 == len(tokens)
        if now.endswith(_UNFINISHED) and not is_last and index - done < _CONTEXT:
            pieces.append("")
            continue
        pieces.append(now[len(before) :] if now.startswith(before) else decode(index, index + 1))
        done = index + 1
    return pieces
