"""The label of a row that is to be classified, as a number."""

import json
import math
from typing import Any

from moe_jax.config.classification import ClassificationConfig
from moe_jax.errors import DataError


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
