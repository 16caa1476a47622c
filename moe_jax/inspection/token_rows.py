"""Data sets as tokenized rows, as training would show them to the model, and the text of tokens."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.config.data import Schema, SourceConfig
from moe_jax.data.chat_template import require_chat_template
from moe_jax.data.encoding import encode_examples, make_examples
from moe_jax.data.files import skipped_text
from moe_jax.data.prompt_template import PromptTemplate, load_prompt_template
from moe_jax.data.schema_choice import TEXT_SCHEMAS
from moe_jax.data.sources import read_source, with_schema
from moe_jax.data.tokenizer import encode_prompt
from moe_jax.errors import DataError
from moe_jax.tasks.task import Task
from moe_jax.tasks.training_rows import question_rows

Sources = Mapping[str, SourceConfig | Task | Sequence[str]]
"""Data sets by name: a source of rows, a task (its questions with the right labels), or texts."""

_UNFINISHED = "\ufffd"
_DECODING_CONTEXT = 4
"""Preceding tokens that a token is decoded with: SentencePiece drops the space of the first one."""


class TokenRow(NamedTuple):
    """A tokenized sequence.

    Attributes:
      data: name of the data set.
      where: origin of the row, such as a file and line.
      tokens: int32 [n].
    """

    data: str
    where: str
    tokens: np.ndarray


class TokenRows(NamedTuple):
    """Tokenized sequences of all data sets.

    Attributes:
      rows: sequences, data set by data set, in the order of their files.
      report: one line for each data set with its number of rows and tokens.
    """

    rows: list[TokenRow]
    report: list[str]


def read_token_rows(
    data: Sources, tokenizer: PreTrainedTokenizerBase, *, limit: int, max_length: int
) -> TokenRows:
    """Reads and tokenizes data sets.

    Rows are tokenized as in training: prompt, completion and end-of-text token. Rows longer than
    `max_length` are cut at their end, except raw text, which is divided. Texts given as strings are
    divided too; they start with the tokenizer's leading tokens and have no end-of-text token.

    Args:
      data: data sets by name.
      tokenizer: tokenizer of the base.
      limit: number of rows of each data set, from the start.
      max_length: maximum number of tokens of a row.

    Raises:
      DataError: a data set cannot be read, a row does not fit its schema, or there is no token.
    """
    rows, report = [], []
    for name, source in data.items():
        notes: list[str] = []
        if isinstance(source, SourceConfig):
            chosen = with_schema(source, None, TEXT_SCHEMAS)
            encoded, notes = _read_source(chosen, tokenizer, limit)
            if source.schema is None:
                notes = [f"schema {chosen.schema!r} by their columns", *notes]
            divide = chosen.schema == "text"
        elif isinstance(source, Task):
            questions = question_rows(source, "label")[:limit]
            encoded, divide = _encode(questions, "completion", None, tokenizer), False
        else:
            texts = list(enumerate(source[:limit], 1))
            for number, text in texts:
                if not text.strip():
                    raise DataError(f"{name}: text {number} is empty")
            encoded = [(f"text {n}", encode_prompt(tokenizer, text)) for n, text in texts]
            divide = True
        data_rows, num_truncated = _rows(name, encoded, max_length, divide)
        if not data_rows:
            raise DataError(f"{name}: holds no text")
        rows += data_rows
        count = sum(len(row.tokens) for row in data_rows)
        if num_truncated:
            notes.insert(0, f"{num_truncated} cut to {max_length} tokens")
        report.append(", ".join([f"{name}: {len(data_rows)} rows, {count:,} tokens", *notes]))
    if not rows:
        raise DataError("no text is given; name a data set or a text")
    return TokenRows(rows, report)


def _read_source(
    source: SourceConfig, tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """Origin and tokens of each row, and notes on the files."""
    if source.schema not in TEXT_SCHEMAS:
        raise DataError(
            f"{source.title}: rows of the schema {source.schema!r} hold no text to tokenize; give "
            "another schema, or a task itself"
        )
    if source.schema == "chat":
        require_chat_template(tokenizer, source.title)
    template = load_prompt_template(source.prompt) if source.schema == "instruction" else None
    table = read_source(source, None)
    rows: Any = table.rows.select(range(min(limit, len(table.rows))))
    notes = [f"skipped {skipped_text(table.skipped)}"] if table.skipped else []
    return _encode(rows, source.schema, template, tokenizer), notes


def _encode(
    rows: Iterable[dict[str, str]],
    schema: Schema,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[str, list[int]]]:
    """Origin and tokens of each row."""
    encoded = []
    for row in rows:
        examples = make_examples(row, schema, template, tokenizer)
        tokens_and_masks = encode_examples(examples, tokenizer, train_on_prompt=False)
        encoded += [(Path(row["where"]).name, tokens) for tokens, _ in tokens_and_masks]
    return encoded


def _rows(
    data: str, encoded: Sequence[tuple[str, list[int]]], max_length: int, divide: bool
) -> tuple[list[TokenRow], int]:
    """Rows of at most `max_length` tokens, and the number of truncated ones."""
    rows, num_truncated = [], 0
    for where, tokens in encoded:
        exceeds = len(tokens) > max_length
        starts = range(0, len(tokens), max_length) if divide else range(min(1, len(tokens)))
        num_truncated += exceeds and not divide
        for start in starts:
            origin = f"{where}, from token {start}" if exceeds and divide else where
            ids = np.asarray(tokens[start : start + max_length], np.int32)
            rows.append(TokenRow(data, origin, ids))
    return rows, num_truncated


def token_texts(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """Text of each token; joined, they are the decoded sequence.

    Tokens of an incomplete character (such as bytes of an emoji) have an empty text, and the token
    that completes the character has all of it.
    """

    def decode(start: int, stop: int) -> str:
        text = tokenizer.decode(list(tokens[start:stop]), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    texts: list[str] = []
    num_decoded = 0  # tokens whose text is complete
    for index in range(len(tokens)):
        start = max(0, num_decoded - _DECODING_CONTEXT)
        prefix, text = decode(start, num_decoded), decode(start, index + 1)
        is_last = index + 1 == len(tokens)
        is_unfinished = text.endswith(_UNFINISHED) and index - num_decoded < _DECODING_CONTEXT
        if is_unfinished and not is_last:
            texts.append("")
            continue
        texts.append(text[len(prefix) :] if text.startswith(prefix) else decode(index, index + 1))
        num_decoded = index + 1
    return texts
