"""From a checked row to pieces of text, each marked as given or as to be learnt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.config.data import Schema
from moe_jax.data.chat import conversation_pieces
from moe_jax.data.prompt_template import PromptTemplate
from moe_jax.data.readers import READERS, read_rows
from moe_jax.data.tokenizer import encode, leading_tokens
from moe_jax.errors import DataError


class Piece(NamedTuple):
    """A stretch of text; `is_target` where the model is to learn to write it."""

    text: str
    is_target: bool


class Example(NamedTuple):
    """A row as text.

    Attributes:
      pieces: the stretches of text, in order.
      leads: whether the tokenizer's leading tokens (BOS) go before it.
      ends: whether an end-of-text token, a target, goes after it.
    """

    pieces: tuple[Piece, ...]
    leads: bool
    ends: bool


def make_examples(
    row: dict[str, str],
    schema: Schema,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    """The examples of one checked row: one, or for some chat templates one per assistant turn.

    Args:
      row: the fields of the schema, and `where`.
      schema: which fields the row has.
      template: the prompt template, for the schema `instruction`.
      tokenizer: its chat template renders the schema `chat`.

    Raises:
      DataError: the row does not go with the prompt template or the chat template.
    """
    if schema == "text":
        return [Example((Piece(row["text"], True),), leads=True, ends=True)]
    if schema == "chat":
        conversations = conversation_pieces(json.loads(row["messages"]), tokenizer, row["where"])
        return [
            Example(tuple(Piece(*piece) for piece in pieces), leads=False, ends=ends)
            for pieces, ends in conversations
        ]
    if schema in ("completion", "task"):
        prompt, completion = row["prompt"], row["completion"]
    else:
        assert template is not None
        prompt = template.fill(row["instruction"], row["input"], row["where"])
        completion = row["output"]
    return [Example((Piece(prompt, False), Piece(completion, True)), leads=True, ends=True)]


# FIXME docstring of the merged data.texts:
# """Texts that are to be classified, as token ids.
#
# A row becomes the tokens that its tokenizer puts in front of a text and those of the text; of two
# texts, of both with a line break between them. Nothing follows: the row is classified at its last
# token, as transformers' sequence classifiers do.
# """


BETWEEN = "\n"
"""What stands between two texts."""


def encode_texts(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each text, or of each pair of texts; the second is empty where there is one."""
    lead = leading_tokens(tokenizer)
    joined = [BETWEEN.join((first, second)) if second else first for first, second in texts]
    return [[*lead, *ids] for ids in encode(tokenizer, joined)]


# FIXME docstring of the merged data.measuring_rows:
# """Text as rows of tokens to measure a model on."""


_COLUMN = "text"


def measuring_rows(
    file: Path, tokenizer: PreTrainedTokenizerBase, *, length: int = 512, most: int = 64
) -> np.ndarray:
    """The first tokens of a file, its texts one after the other.

    Each text begins with the tokens that its tokenizer puts in front of a text. What does not fill
    a row is left out, unless there is no other row.

    Args:
      file: a text file, whose texts are its blocks between blank lines; or rows in one of the other
        kinds of file that training reads, each with a column `text`.
      tokenizer: of the model.
      length: of a row, S.
      most: rows, N at most.

    Returns:
      int32 [N, S].

    Raises:
      DataError: the file cannot be read, is of an unknown kind, a row has no text, or there are not
        two tokens in it.
    """
    if file.suffix.lower() not in READERS:
        raise DataError(f"{file}: the kind of file is unknown; supported: {', '.join(READERS)}")
    tokens: list[int] = []
    leading = leading_tokens(tokenizer)
    for where, row in read_rows(file):
        text = row.get(_COLUMN) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{where}: has no text in a column {_COLUMN!r}")
        tokens += leading + encode(tokenizer, [text])[0]
        if len(tokens) >= length * most:
            break
    if len(tokens) < 2:
        raise DataError(f"{file}: holds no text to measure on")
    length = min(length, len(tokens))
    count = min(len(tokens) // length, most)
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)
