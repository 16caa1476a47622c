"""Language models inside models that also read images or audio.

Such a wrapper keeps the fields of its language model in `text_config` of `config.json`, and the
tensors behind a prefix such as `language_model.`. In the group transformers leaves out fields that
have the defaults of their class, sizes too.
"""

import re
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import CheckpointError
from moe_jax.hf.families import FAMILIES
from moe_jax.hf.families.family import MODEL
from moe_jax.hf.nearest_family import unsupported

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
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Language models that compute what another family computes, in rows of text. Theirs rotates by
# three positions of an image's patch, which are equal at a token (M-RoPE, arXiv:2409.12191, 2.1).
_OF_TEXT_ALONE = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_IMAGE_POSITIONS = ("mrope_section", "mrope_interleaved")

# Published files of these have the fields of their language model outside a group.
_WITHOUT_GROUP = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
LOADED_ALONE = ("qwen3_5",)
"""Wrappers from which transformers' `AutoModelForCausalLM` loads the language model alone."""

# Their language models attend to a prompt in both directions.
_OTHER_ATTENTION = ("paligemma",)


def is_wrapper(mapping: Mapping[str, Any]) -> bool:
    """True for the fields of the `config.json` of a model with a language model inside it."""
    model_type = mapping.get("model_type")
    lacks_group = isinstance(model_type, str) and model_type in _WITHOUT_GROUP
    return lacks_group or isinstance(mapping.get(GROUP), Mapping)


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
    outer_type = mapping.get("model_type")
    inner = mapping.get(GROUP)
    if not isinstance(inner, Mapping):
        inner = {**mapping, "model_type": _WITHOUT_GROUP[str(outer_type)]}
    model_type = inner.get("model_type")
    if isinstance(model_type, str) and model_type in _OF_TEXT_ALONE:
        inner, model_type = _of_text_alone(inner, where), _OF_TEXT_ALONE[model_type]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        subject = f"a language model of type {model_type!r}"
        raise unsupported(inner, f"{where}: {GROUP}.model_type", subject)
    if outer_type in _OTHER_ATTENTION:
        raise CheckpointError(
            f"{where}: model_type {outer_type!r} is not supported, as its language model attends "
            "to a prompt in both directions"
        )
    whole = {key: mapping[key] for key in _TOKEN_IDS if mapping.get(key) is not None}
    for key in ("tie_word_embeddings", "quantization_config"):
        if mapping.get(key) is not None:
            whole[key] = mapping[key]
    architecture = FAMILIES[model_type].architecture
    sizes = _sizes(inner, model_type, where)
    return {**inner, **sizes, **whole, "architectures": [architecture]}


def _of_text_alone(inner: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of the family that computes the same in rows of text; see `_OF_TEXT_ALONE`."""
    others = ("architectures", "model_type", "vision_config", "use_mrope", *_TOKEN_IDS)
    given = {key: value for key, value in inner.items() if key not in others}
    complete = _completed(inner["model_type"], given, where).to_dict()
    rope = complete["rope_parameters"]
    return complete | {
        "model_type": _OF_TEXT_ALONE[inner["model_type"]],
        "rope_parameters": {k: v for k, v in rope.items() if k not in (*_IMAGE_POSITIONS, "type")},
        "tie_word_embeddings": bool(inner.get("tie_word_embeddings")),
    }


def _sizes(inner: Mapping[str, Any], model_type: str, where: str) -> dict[str, Any]:
    """Sizes of the language model, as transformers completes them."""
    given = {key: inner[key] for key in (*_SIZES, "layer_types") if inner.get(key) is not None}
    # As a dict: attributes that differ from layer to layer, as in Gemma 4, cannot be read.
    complete = _completed(model_type, given, where).to_dict()
    return {key: complete[key] for key in _SIZES if complete.get(key)}


def _completed(model_type: str, given: Mapping[str, Any], where: str) -> Any:
    """The configuration of a language model as transformers completes it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(model_type, **given)
    except Exception as error:  # its checks raise types of several libraries
        reason = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{where}: {GROUP}: {reason}") from error


def wrapped_names(module: str) -> tuple[str, str]:
    """Names of a language model's module, such as `model.layers.0.mlp`, inside a wrapper."""
    return f"language_model.{module}", f"model.language_model.{module.removeprefix(MODEL)}"
