"""Token rows of fixed length from a data set, to measure a model on."""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.config.data import SourceConfig
from moe_jax.data.chat_template import require_chat_template
from moe_jax.data.encoding import encode_examples, make_examples
from moe_jax.data.prompt_template import load_prompt_template
from moe_jax.data.schema_choice import TEXT_SCHEMAS, choose_schema
from moe_jax.data.sources import first_columns, iterate_rows
from moe_jax.data.tokenizer import encode, leading_tokens
from moe_jax.errors import DataError


def load_token_rows(
    file: Path, tokenizer: PreTrainedTokenizerBase, *, length: int = 512, max_rows: int = 64
) -> np.ndarray:
    """Reads the texts of a data set as token rows of fixed length, one text after another.

    Rows with a column `text` are that text, after the tokenizer's leading tokens. Others are prompt
    and completion, as in training. Tokens that do not fill a row are dropped, unless they are the
    only ones.

    Args:
      file: file, folder or pattern, as in `SourceConfig.path`.
      tokenizer: tokenizer of the model.
      length: tokens of a row, S.
      max_rows: largest number of rows, B.

    Returns:
      int32 [B, S].

    Raises:
      DataError: the data cannot be read, its columns do not tell its schema, or it holds fewer than
        two tokens.
    """
    source = SourceConfig(path=str(file))
    where, columns = first_columns(source, None)
    schemas = ("text",) if "text" in columns else TEXT_SCHEMAS
    remedy = "give a file with a column 'text', or with the columns of exactly one of these schemas"
    source = choose_schema(source, columns, where, schemas, remedy)
    assert source.schema is not None
    if source.schema == "chat":
        require_chat_template(tokenizer, source.title)
    template = load_prompt_template(source.prompt) if source.schema == "instruction" else None
    tokens: list[int] = []
    for row in iterate_rows(source, None):
        if source.schema == "text":
            tokens += leading_tokens(tokenizer) + encode(tokenizer, [row["text"]])[0]
        else:
            examples = make_examples(row, source.schema, template, tokenizer)
            for ids, _ in encode_examples(examples, tokenizer, train_on_prompt=False):
                tokens += ids
        if len(tokens) >= length * max_rows:
            break
    if len(tokens) < 2:
        raise DataError(f"{file}: holds no text; give a file with at least two tokens")
    length = min(length, len(tokens))
    count = min(len(tokens) // length, max_rows)
    return np.asarray(tokens[: count * length], np.int32).reshape(count, length)
