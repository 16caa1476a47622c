"""Language models inside models that also read images or audio.

Such a wrapper keeps the fields of its language model in `text_config` of `config.json`, and the
tensors behind a prefix such as `language_model.`. In the group transformers leaves out fields that
have the defaults of their class, sizes too.
"""

import re
from collections.abc import Mapping
from typing import Any

from moe_jax.config.parse import suggest
from moe_jax.errors import CheckpointError
from moe_jax.hf.families import FAMILIES
from moe_jax.hf.families.family import MODEL

GROUP = "text_config"

PREFIX = re.compile(r"^(model\.)?(language_model|text_model)\.")
"""Prefix of the language model's tensors; transformers has written all of these."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Their language models attend to a prompt in both directions.
_OTHER_ATTENTION = ("paligemma",)


def is_wrapper(mapping: Mapping[str, Any]) -> bool:
    """True for the fields of the `config.json` of a model with a language model inside it."""
    return isinstance(mapping.get(GROUP), Mapping)


def language_model_fields(mapping: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Fields of the language model, as in a `config.json` of its own.

    Args:
      mapping: fields of a `config.json`.
      where: file or configuration field that holds them, for messages.

    Returns:
      `mapping` itself, unless it is of a wrapper. Otherwise the fields of its `text_config`, with
      the sizes that it leaves out, and with the fields of the wrapper that are about the whole.

    Raises:
      CheckpointError: the language model is of no supported family, or its sizes are invalid.
    """
    if not is_wrapper(mapping):
        return mapping
    inner = mapping[GROUP]
    model_type, outer_type = inner.get("model_type"), mapping.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{where}: {GROUP}.model_type: a language model of type {model_type!r} is not "
            f"supported; {suggest(str(model_type), FAMILIES)}"
        )
    if outer_type in _OTHER_ATTENTION:
        raise CheckpointError(
            f"{where}: model_type {outer_type!r} is not supported, as its language model attends "
            "to a prompt in both directions"
        )
    whole = {key: mapping[key] for key in _TOKEN_IDS if mapping.get(key) is not None}
    for key in ("tie_word_embeddings", "quantization_config"):
        if mapping.get(key) is not None:
            whole[key] = mapping[key]
    architecture = FAMILIES[str(model_type)].architecture
    sizes = _sizes(inner, str(model_type), where)
    return {**inner, **sizes, **whole, "architectures": [architecture]}


def _sizes(inner: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """Sizes of the language model, as transformers completes them."""
    from transformers import AutoConfig

    given = {key: inner[key] for key in _SIZES if inner.get(key) is not None}
    try:
        complete = AutoConfig.for_model(model_type, **given)
    except Exception as error:  # its checks raise types of several libraries
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{where}: {GROUP}: {reason}") from error
    return {key: getattr(complete, key) for key in _SIZES if getattr(complete, key, None)}


def wrapped_names(module: str) -> tuple[str, str]:
    """Names of a language model's module, such as `model.layers.0.mlp`, inside a wrapper."""
    return f"language_model.{module}", f"model.language_model.{module.removeprefix(MODEL)}"
