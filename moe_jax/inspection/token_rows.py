"""The texts to look at, as tokens: rows as training would show them to the model."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.config.data import Schema, SourceConfig
from moe_jax.data.chat import require_chat_template
from moe_jax.data.encoding import make_examples
from moe_jax.data.prompt_template import PromptTemplate, load_prompt_template
from moe_jax.data.sources import read_source
from moe_jax.data.tokenised_source import encode_examples
from moe_jax.data.tokenizer import encode_prompt
from moe_jax.errors import DataError
from moe_jax.tasks.task import Task
from moe_jax.tasks.training_rows import task_rows

Texts = Mapping[str, SourceConfig | Task | Sequence[str]]
"""Data sets by a name of the user's choice: where their rows are read, a task, whose questions are
followed by the right label, or texts themselves."""


class TokenRow(NamedTuple):
    """One sequence to look at.

    Attributes:
      data: the name of its data set.
      where: the place that it came from.
      tokens: int32 [n].
    """

    data: str
    where: str
    tokens: np.ndarray


class TokenRows(NamedTuple):
    """All sequences to look at.

    Attributes:
      rows: data set by data set, in the order of their files.
      report: one line for each data set on what became of its rows.
    """

    rows: list[TokenRow]
    report: list[str]


def read_texts(
    data: Texts, tokenizer: PreTrainedTokenizerBase, *, limit: int, max_length: int
) -> TokenRows:
    """Reads and tokenises data sets.

    A row is what training makes of it, prompt and completion and all. Raw text that is longer than
    `max_length` is divided, and other rows lose their end; a text that is given as it is has its
    tokenizer's leading tokens and no end-of-text token.

    Args:
      data: see `Texts`.
      tokenizer: of the base.
      limit: rows of each data set, the first ones.
      max_length: tokens of a row.

    Raises:
      DataError: a data set cannot be read, a row does not fit its schema, or there is no token.
    """
    rows, report = [], []
    for name, source in data.items():
        if isinstance(source, SourceConfig):
            encoded = _read_source(source, tokenizer, limit)
            divide = source.schema == "text"
        elif isinstance(source, Task):
            rows_of_task = task_rows(source, "label")[:limit]
            encoded, divide = _encode(rows_of_task, "completion", None, tokenizer), False
        else:
            texts = list(enumerate(source[:limit], 1))
            for number, text in texts:
                if not text.strip():
                    raise DataError(f"{name}: text {number} is empty")
            encoded = [(f"text {n}", encode_prompt(tokenizer, text)) for n, text in texts]
            divide = True
        found, cut = _rows(name, encoded, max_length, divide)
        if not found:
            raise DataError(f"{name}: holds no text to look at")
        rows += found
        count = sum(len(row.tokens) for row in found)
        lost = f", {cut} cut to {max_length} tokens" if cut else ""
        report.append(f"{name}: {len(found)} rows, {count:,} tokens{lost}")
    if not rows:
        raise DataError("no text is given; name a data set or a text")
    return TokenRows(rows, report)


def _read_source(
    source: SourceConfig, tokenizer: PreTrainedTokenizerBase, limit: int
) -> list[tuple[str, list[int]]]:
    if source.schema in ("task", "classification"):
        raise DataError(
            f"{source.title}: rows of the schema {source.schema!r} are no text by themselves; give "
            "another schema, or a task itself"
        )
    if source.schema == "chat":
        require_chat_template(tokenizer, source.path)
    template = load_prompt_template(source.prompt) if source.schema == "instruction" else None
    try:
        table = read_source(source, None).rows
    except DataError as error:
        if source.schema == "text" and "no column" in str(error):
            raise DataError(f"{error}; of rows of another kind give the schema") from None
        raise
    rows: Any = table.select(range(min(limit, len(table))))
    return _encode(rows, source.schema, template, tokenizer)


def _encode(
    rows: Iterable[dict[str, str]],
    schema: Schema,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[str, list[int]]]:
    """Place and tokens of each row."""
    found = []
    for row in rows:
        examples = make_examples(row, schema, template, tokenizer)
        encoded = encode_examples(examples, tokenizer, train_on_prompt=False)
        found += [(Path(row["where"]).name, tokens) for tokens, _ in encoded]
    return found


def _rows(
    data: str, encoded: Sequence[tuple[str, list[int]]], max_length: int, divide: bool
) -> tuple[list[TokenRow], int]:
    """Rows of at most `max_length` tokens, and how many lost their end."""
    rows, cut = [], 0
    for where, tokens in encoded:
        longer = len(tokens) > max_length
        starts = range(0, len(tokens), max_length) if divide else range(min(1, len(tokens)))
        cut += longer and not divide
        for start in starts:
            place = f"{where}, from token {start}" if longer and divide else where
            part = np.asarray(tokens[start : start + max_length], np.int32)
            rows.append(TokenRow(data, place, part))
    return rows, cut


# FIXME docstring of the merged inspection.pieces:
# """The text that each token of a row stands for."""


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
