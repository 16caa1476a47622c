"""Reads a Hugging Face `config.json` into a `ModelConfig`.

The raw file is read, not transformers' view of it: transformers 5 and the versions before it state
rotary embeddings differently, and each fills in what a file leaves out.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_jax.config.model import ModelConfig, RopeConfig
from moe_jax.config.parse import FieldError, parse, suggest
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.layers.activation import ACTIVATIONS
from moe_jax.layers.rope import ROPE_TYPES

# What a Llama `config.json` means by leaving a field out. The values are the documented defaults of
# transformers' `LlamaConfig`; files written before a field existed rely on them (Llama 1 and 2 have
# no rope_theta, Llama 1 no num_key_value_heads). Sizes of the model are never filled in.
LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

# `ModelConfig` field -> (key in config.json, type)
_LLAMA_FIELDS: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("intermediate_size", int),
    "num_layers": ("num_hidden_layers", int),
    "num_heads": ("num_attention_heads", int),
    "hidden_act": ("hidden_act", str),
    "max_position_embeddings": ("max_position_embeddings", int),
    "rms_norm_eps": ("rms_norm_eps", float),
    "attention_bias": ("attention_bias", bool),
    "mlp_bias": ("mlp_bias", bool),
    "tie_word_embeddings": ("tie_word_embeddings", bool),
}
_HF_NAMES = {name: key for name, (key, _) in _LLAMA_FIELDS.items()} | {
    "num_kv_heads": "num_key_value_heads"
}

# The fields of each rope_type beside rope_theta; a further known field is of another type and not
# read, as in transformers.
_ROPE_FIELDS: dict[str, dict[str, type]] = {
    "default": {},
    "linear": {"factor": float},
    "dynamic": {"factor": float},
    "llama3": {
        "factor": float,
        "low_freq_factor": float,
        "high_freq_factor": float,
        "original_max_position_embeddings": int,
    },
    "yarn": {
        "factor": float,
        "original_max_position_embeddings": int,
        "attention_factor": float,
        "beta_fast": float,
        "beta_slow": float,
        "mscale": float,
        "mscale_all_dim": float,
        "truncate": bool,
    },
}
# `finetuned` is a note in the files of the first YaRN models; transformers does not read it either.
_ROPE_NOTES = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture that `folder/config.json` states.

    Raises:
      CheckpointError: the file is missing or malformed, of an architecture that is not supported,
        or lacks or contradicts a field.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        if (Path(folder) / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder}: holds an adapter (adapter_config.json), not a base model; give the "
                f"folder or hub id of the model that it was trained on"
            )
        raise CheckpointError(
            f"{path}: no such file; give a folder with a Hugging Face checkpoint "
            f"(config.json and *.safetensors)"
        )
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(mapping, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(mapping).__name__}")
    return model_config_from_hf(mapping, str(path))


def model_config_from_hf(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    """The architecture that the fields of a Hugging Face `config.json` state.

    Args:
      mapping: the fields, as read from JSON.
      where: the file or configuration field that they come from, for messages.

    Raises:
      CheckpointError: an architecture that is not supported; a field that is missing, of the wrong
        type, contradicted by another, or that asks for something which is not implemented.
    """
    reader = ARCHITECTURES[_architecture(mapping, where)]
    try:
        return reader(mapping, where)
    except FieldError as error:
        key = _HF_NAMES.get(error.field, error.field)
        raise CheckpointError(f"{where}: {key}: {error.reason}") from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _architecture(mapping: Mapping[str, Any], where: str) -> str:
    """The model class of the checkpoint, one of `ARCHITECTURES`."""
    model_type = mapping.get("model_type")
    named = mapping.get("architectures") or []
    if not named:  # files written by hand
        named = [name for name, kind in _MODEL_TYPES.items() if kind == model_type]
    for name in named:
        # Early Llama files have no model_type; another one there means other mathematics.
        if name in ARCHITECTURES and model_type in (None, _MODEL_TYPES[name]):
            return name
    supported = ", ".join(f"{name} ({kind})" for name, kind in _MODEL_TYPES.items())
    found = ", ".join(str(name) for name in named) or "none"
    raise CheckpointError(
        f"{where}: architecture {found} of model_type {model_type!r} is not supported; "
        f"supported: {supported}"
    )


def _read_llama(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    if mapping.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: quantization_config: the weights are stored quantised, which is not "
            f"supported; use the float checkpoint that they were made from"
        )
    values = {
        name: _field(mapping, key, kind, where) for name, (key, kind) in _LLAMA_FIELDS.items()
    }
    if values["hidden_act"] not in ACTIVATIONS:
        raise CheckpointError(
            f"{where}: hidden_act: {values['hidden_act']!r} is not supported; "
            f"{suggest(values['hidden_act'], ACTIVATIONS)}"
        )
    heads = values["num_heads"]
    kv_heads = _optional(mapping, "num_key_value_heads", int, where)
    values["num_kv_heads"] = heads if kv_heads is None else kv_heads
    head_dim = _optional(mapping, "head_dim", int, where)
    if head_dim is None:
        if heads < 1 or values["hidden_size"] % heads:
            raise CheckpointError(
                f"{where}: hidden_size: {values['hidden_size']} is not a multiple of "
                f"num_attention_heads ({heads}), and head_dim is not given"
            )
        head_dim = values["hidden_size"] // heads
    rope = _read_rope(mapping, values["max_position_embeddings"], where)
    return ModelConfig(head_dim=head_dim, rope=rope, **values)


def _read_rope(mapping: Mapping[str, Any], max_position_embeddings: int, where: str) -> RopeConfig:
    """`rope_parameters` of transformers 5, or `rope_scaling` and `rope_theta` of those before."""
    section, fields = _rope_section(mapping, where)
    at = f"{where}: {section}"
    if fields.get("type") is not None and fields.get("rope_type") not in (None, fields["type"]):
        raise CheckpointError(
            f"{at}: type {fields['type']!r} contradicts rope_type {fields['rope_type']!r}; keep one"
        )
    rope_type = fields.get("rope_type") or fields.get("type")
    if rope_type is None:
        if set(fields) - _ROPE_NOTES:
            raise CheckpointError(
                f"{at}: has no rope_type; say which of {', '.join(ROPE_TYPES)} is meant"
            )
        rope_type = "default"
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"{at}.rope_type: {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    known = {name for names in _ROPE_FIELDS.values() for name in names} | _ROPE_NOTES
    for name in fields:
        if name not in known:
            raise CheckpointError(f"{at}.{name}: unknown field; {suggest(name, known)}")
    for at_partial, owner in ((where, mapping), (at, fields)):
        if owner.get("partial_rotary_factor") not in (None, 1):
            raise CheckpointError(f"{at_partial}: partial_rotary_factor: only 1.0 is supported")
    values = {
        name: _optional(fields, name, kind, at) for name, kind in _ROPE_FIELDS[rope_type].items()
    }
    if "original_max_position_embeddings" in values:
        # transformers lets a value beside the section win over the one in it, and takes the model's
        # length where there is neither.
        beside = _optional(mapping, "original_max_position_embeddings", int, where)
        if beside is not None:
            values["original_max_position_embeddings"] = beside
        elif values["original_max_position_embeddings"] is None:
            values["original_max_position_embeddings"] = max_position_embeddings
    values = {name: value for name, value in values.items() if value is not None}
    theta = _rope_theta(mapping, fields, at, where)
    try:
        return RopeConfig(rope_type=rope_type, rope_theta=theta, **values)
    except FieldError as error:
        raise CheckpointError(f"{at}.{error.field}: {error.reason}") from None


def _rope_section(mapping: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """The name and the fields of the section that describes rotary embeddings; nulls left out."""
    sections = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = mapping.get(name)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{where}: {name}: expected a group of fields, got {type(value).__name__}"
            )
        if value:
            sections[name] = {key: item for key, item in value.items() if item is not None}
    if len(sections) == 2 and sections["rope_parameters"] != sections["rope_scaling"]:
        raise CheckpointError(
            f"{where}: rope_parameters contradicts rope_scaling; keep one of them"
        )
    return next(iter(sections.items()), ("rope_scaling", {}))


def _rope_theta(mapping: Mapping[str, Any], fields: dict[str, Any], at: str, where: str) -> float:
    inside = _optional(fields, "rope_theta", float, at)
    beside = _optional(mapping, "rope_theta", float, where)
    if inside is not None and beside is not None and inside != beside:
        raise CheckpointError(
            f"{at}.rope_theta: {inside} contradicts rope_theta {beside}; keep one"
        )
    stated = beside if inside is None else inside
    return LLAMA_DEFAULTS["rope_theta"] if stated is None else stated


def _optional(mapping: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """`mapping[key]`, checked to be of type `kind`; None where it is missing or null."""
    value = mapping.get(key)
    return None if value is None else parse(kind, value, f"{where}: {key}")


def _field(mapping: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = _optional(mapping, key, kind, where)
    if value is None:
        if key not in LLAMA_DEFAULTS:
            raise CheckpointError(f"{where}: {key}: this field is required and was not given")
        return LLAMA_DEFAULTS[key]
    return value


# A further model family is a reader and a line in each.
ARCHITECTURES: dict[str, Callable[[Mapping[str, Any], str], ModelConfig]] = {
    "LlamaForCausalLM": _read_llama,
}
_MODEL_TYPES: dict[str, str] = {"LlamaForCausalLM": "llama"}
