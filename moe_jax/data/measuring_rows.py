"""Text as rows of tokens to measure a model on."""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.data.readers import READERS, read_rows
from moe_jax.data.tokenizer import encode, leading_tokens
from moe_jax.errors import DataError

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
