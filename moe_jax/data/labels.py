"""Rows that are to be classified: text as token ids, and the label as a number.

A row becomes the tokens that its tokenizer puts in front of a text and those of the text; of two
texts, of both with a line break between them. Nothing follows: the row is classified at its last
token, as transformers' sequence classifiers do.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_jax.config.classification import ClassificationConfig
from moe_jax.data.tokenizer import encode, leading_tokens
from moe_jax.errors import DataError

BETWEEN = "\n"
"""What stands between two texts."""


def encode_texts(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Token ids of each text, or of each pair of texts; the second is empty where there is one."""
    lead = leading_tokens(tokenizer)
    joined = [BETWEEN.join((first, second)) if second else first for first, second in texts]
    return [[*lead, *ids] for ids in encode(tokenizer, joined)]


def label_number(value: Any, classification: ClassificationConfig, where: str) -> float:
    """The index of a row's class, or its number.

    A text is the name of a class. So is a number that the names themselves are; any other is an
    index from 0.

    Args:
      value: what stands in the row.
      classification: the classes.
      where: file, row and column, for messages.

    Raises:
      DataError: it is none of the classes, or no number.
    """
    if classification.regression:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise DataError(f"{where} must be a finite number, got {json.dumps(value)}")
        return float(value)
    labels = classification.labels
    if isinstance(value, str | int) and not isinstance(value, bool):
        if str(value) in labels:
            return float(labels.index(str(value)))
        numbered = any(label.lstrip("-").isdigit() for label in labels)
        if isinstance(value, int) and not numbered and 0 <= value < len(labels):
            return float(value)
    hint = "; take a split whose answers are public" if value == -1 else ""
    raise DataError(
        f"{where} is {json.dumps(value)}, which is none of the labels ({', '.join(labels)}), nor "
        f"the index of one{hint}"
    )


def check_label(value: Any, where: str) -> str:
    """A label as JSON text, whatever it stands for.

    Raises:
      DataError: it is neither text nor a number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where} must be a label's name, its index or a number, got {value!r}")
    return json.dumps(value)
