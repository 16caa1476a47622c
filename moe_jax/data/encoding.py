"""Checked rows as examples, and texts and examples as token ids.

Generation sees the prompt alone, so the ids of an example must begin with the ids of its prompt.
Prompt and completion encoded jointly nearly always satisfy this, and read as the model would write
them. Where the two fuse into one token across the boundary, the completion is encoded separately,
in a way that adds no space in front of it (SentencePiece tokenizers put one before every text).
"""

import functools
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.config.data import Schema
from moe_jax.data.chat import conversation_spans
from moe_jax.data.prompt_template import PromptTemplate
from moe_jax.data.readers import READERS, read_rows
from moe_jax.data.tokenizer import encode, end_of_text, leading_tokens
from moe_jax.errors import DataError

TEXT_COLUMN = "text"
"""Column that holds the text of a row, where rows are plain text."""

PAIR_SEPARATOR = "\n"
"""Text between the two texts of a pair to classify."""


class TextSpan(NamedTuple):
    """A stretch of text; `is_target` if the model is trained to write it."""

    text: str
    is_target: bool


class Example(NamedTuple):
    """A row as text.

    Attributes:
      spans: stretches of text, in order.
      add_bos: true if the tokenizer's leading tokens (BOS) precede the text.
      add_eos: true if an end-of-text token, a target, follows the text.
    """

    spans: tuple[TextSpan, ...]
    add_bos: bool
    add_eos: bool


def make_examples(
    row: dict[str, str],
    schema: Schema,
    template: PromptTemplate | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    """Examples of one checked row: one, or for some chat templates one per assistant turn.

    Args:
      row: fields of the schema, and `where`.
      schema: schema of the row.
      template: prompt template, for the schema `instruction`.
      tokenizer: tokenizer whose chat template renders the schema `chat`.

    Raises:
      DataError: the row does not fit the prompt template or the chat template.
    """
    if schema == "text":
        return [Example((TextSpan(row["text"], True),), add_bos=True, add_eos=True)]
    if schema == "chat":
        conversations = conversation_spans(json.loads(row["messages"]), tokenizer, row["where"])
        return [
            Example(tuple(TextSpan(*span) for span in spans), add_bos=False, add_eos=add_eos)
            for spans, add_eos in conversations
        ]
    if schema in ("completion", "task"):
        prompt, completion = row["prompt"], row["completion"]
    else:
        assert template is not None
        prompt = template.fill(row["instruction"], row["input"], row["where"])
        completion = row["output"]
    return [
        Example((TextSpan(prompt, False), TextSpan(completion, True)), add_bos=True, add_eos=True)
    ]


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool
) -> list[tuple[list[int], list[bool]]]:
    """Token ids and loss mask of each example, in full length.

    The mask is true at tokens of a target span and at the end-of-text token; with
    `train_on_prompt` at every token, including the first one, which no token precedes.
    """
    prefixes = [text for example in examples for text in accumulate(s.text for s in example.spans)]
    prefix_ids = iter(encode(tokenizer, prefixes))
    leading, end = leading_tokens(tokenizer), end_of_text(tokenizer)
    encoded = []
    for example in examples:
        tokens = list(leading) if example.add_bos else []
        loss_mask = [train_on_prompt] * len(tokens)
        ids_before: list[int] = []
        for span in example.spans:
            ids = next(prefix_ids)
            if ids[: len(ids_before)] == ids_before:
                new = ids[len(ids_before) :]
            else:
                new = _encode_continuation(ids_before, span.text, ids, tokenizer)
            tokens += new
            loss_mask += [span.is_target or train_on_prompt] * len(new)
            ids_before = ids
        if example.add_eos:
            tokens.append(end)
            loss_mask.append(True)
        encoded.append((tokens, loss_mask))
    return encoded


def _encode_continuation(
    ids_before: list[int], text: str, ids_joint: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Ids of `text` alone that decode to it after `ids_before`.

    Returns the first of three encodings that decodes to the right text: of the text alone
    (byte-level tokenizers), after a line break, and after an end-of-text token (tokenizers that
    mark the start of a text). Where Unicode normalisation across the boundary leaves none of them
    exact, the encoding of the text alone is the nearest.
    """
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    expected = decode(ids_joint)
    alone, newline, after_newline, after_end = encode(
        tokenizer, [text, "\n", "\n" + text, str(tokenizer.eos_token) + text]
    )
    candidates = [alone]
    if after_newline[: len(newline)] == newline:
        candidates.append(after_newline[len(newline) :])
    if after_end[:1] == [end_of_text(tokenizer)]:
        candidates.append(after_end[1:])
    for candidate in candidates:
        if decode(ids_before + candidate) == expected:
            return candidate
    return alone


def encode_texts(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of texts, or pairs of texts, to classify.

    The tokenizer's leading tokens, then the text; the two texts of a pair are joined by a line
    break. Nothing follows: a row is classified at its last token, as in transformers' sequence
    classifiers.

    Args:
      texts: pairs of texts; the second is empty for a single text.
      tokenizer: tokenizer of the base model.
    """
    leading = leading_tokens(tokenizer)
    joined = [PAIR_SEPARATOR.join((first, second)) if second else first for first, second in texts]
    return [[*leading, *ids] for ids in encode(tokenizer, joined)]


def load_token_rows(
    file: Path, tokenizer: PreTrainedTokenizerBase, *, length: int = 512, max_rows: int = 64
) -> np.ndarray:
    """Reads the texts of a file as token rows of fixed length, one text after another.

    Each text begins with the tokenizer's leading tokens. Tokens that do not fill a row are dropped,
    unless they are the only ones.

    Args:
      file: a text file, whose texts are its blocks between blank lines, or a file of another kind
        that training reads, whose rows have a column `text`.
      tokenizer: tokenizer of the model.
      length: tokens of a row, S.
      max_rows: largest number of rows, B.

    Returns:
      int32 [B, S].

    Raises:
      DataError: the file cannot be read, is of an unknown kind, has a row without text, or holds
        fewer than two tokens.
    """
    if file.suffix.lower() not in READERS:
        raise DataError(f"{file}: the kind of file is unknown; supported: {', '.join(READERS)}")
    tokens: list[int] = []
    leading = leading_tokens(tokenizer)
    for where, row in read_rows(file):
        text = row.get(TEXT_COLUMN) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f"{where}: has no text in a column {TEXT_COLUMN!r}")
        tokens += leading + encode(tokenizer, [text])[0]
        if len(tokens) >= length * max_rows:
            break
    if len(tokens) < 2:
        raise DataError(f"{file}: holds no text; give a file with at least two tokens")
    length = min(length, len(tokens))
    count = min(len(tokens) // length, max_rows)
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)
