"""The known model family that is nearest to an unknown one, and what it does not compute of it."""

import contextlib
import difflib
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import CheckpointError, UserError
from moe_jax.hf.families import FAMILIES, Family
from moe_jax.hf.fields import NEUTRAL_VALUES, HFFields
from moe_jax.terminal import value_text

# Any sizes: the keys that a family reads do not depend on them.
_ANY_SIZES = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
# Notes, and settings of training and of transformers, which change no logits.
_NO_COMPUTATION = frozenset(
    {
        "architectures",
        "attention_dropout",
        "auto_map",
        "cache_implementation",
        "classifier_dropout",
        "dtype",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "name_or_path",
        "pretraining_tp",
        "residual_dropout",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_MOST_NAMED = 6
_SIMILAR = 0.6  # of names, as in `difflib.get_close_matches`


def unsupported(mapping: Mapping[str, Any], where: str, subject: str) -> CheckpointError:
    """Error about a model of no known family, which names the nearest one and the differences.

    Args:
      mapping: fields of its `config.json`.
      where: file, and group in it.
      subject: the model in words.
    """
    differences = {family.model_type: _differences(mapping, family) for family in FAMILIES.values()}
    nearest = min(
        FAMILIES.values(),
        key=lambda family: (
            len(differences[family.model_type]),
            -_similarity(mapping, family),
            family.model_type != "llama",  # the plainest one
        ),
    )
    found = differences[nearest.model_type]
    if found:
        rest = len(found) - _MOST_NAMED
        named = ", ".join(found[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
        verdict = f"which does not compute {named}"
    else:
        verdict = "which computes every field of this file: what differs is in the code alone"
    return CheckpointError(
        f"{where}: {subject} is not supported; the nearest is {nearest.model_type} "
        f"({nearest.architecture}), {verdict}; supported: {', '.join(FAMILIES)}"
    )


def _differences(mapping: Mapping[str, Any], family: Family) -> list[str]:
    """Fields of the file that the family does not compute, each with its value."""
    computed = _computed_keys(family)

    def differs(key: str, value: Any) -> bool:
        if key in family.constants:
            return value not in (None, family.constants[key])
        return key not in computed and _is_specified(key, value)

    found = [f"{key} {value_text(value)}" for key, value in mapping.items() if differs(key, value)]
    fields = HFFields(_ANY_SIZES | dict(mapping), "", family.defaults)
    try:
        family.read(fields)
    except UserError as error:  # a value that the family refuses
        reason = str(error).removeprefix(": ")
        key = reason.partition(":")[0]
        found = [*(item for item in found if item.partition(" ")[0] != key), reason]
    return found


def _computed_keys(family: Family) -> set[str]:
    fields = HFFields(_ANY_SIZES, "", family.defaults)
    with contextlib.suppress(UserError):  # one may require fields of its own, after the others
        family.read(fields)
    return fields.seen | family.defaults.keys()


def _is_specified(key: str, value: Any) -> bool:
    """True for a field that may change the computation: not a note, and not off."""
    if key in _NO_COMPUTATION or key.startswith("_") or key.endswith("_token_id") or not value:
        return False
    neutral = NEUTRAL_VALUES.get(key)
    if key == "layer_types" and isinstance(value, list):
        return any(kind != neutral for kind in value)
    return value != neutral


def _similarity(mapping: Mapping[str, Any], family: Family) -> float:
    """Similarity of the names of two models in [0, 1], 0 if it is slight."""
    ratio = difflib.SequenceMatcher(None, str(mapping.get("model_type")), family.model_type).ratio()
    return ratio if ratio >= _SIMILAR else 0.0
