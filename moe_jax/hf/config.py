"""Reads a Hugging Face `config.json` into a `ModelConfig`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.config.model import MAX_LAYERS, ModelConfig
from moe_jax.config.parse import FieldError, parse
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.files.json_file import read_json_object
from moe_jax.hf.families import FAMILIES, Family
from moe_jax.hf.fields import HF_NAMES, NEUTRAL_VALUES, HFFields
from moe_jax.hf.nearest_family import unsupported
from moe_jax.hf.rope import SECTIONS
from moe_jax.hf.wrapper import GROUP, language_model_fields


def read_model_config(folder: Path) -> ModelConfig:
    """Reads the architecture from `folder/config.json`.

    Raises:
      CheckpointError: the file is missing or invalid, its architecture is not supported, or a field
        is missing or contradicts another.
    """
    return model_config_from_hf(read_config_file(folder), str(Path(folder) / "config.json"))


def read_config_file(folder: Path) -> dict[str, Any]:
    """Fields of `folder/config.json`.

    Raises:
      CheckpointError: the file is missing or invalid.
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
    return read_json_object(path)


def model_config_from_hf(mapping: Mapping[str, Any], where: str) -> ModelConfig:
    """Architecture described by the fields of a Hugging Face `config.json`.

    Of a model that also reads images or audio, it is that of the language model.

    Args:
      mapping: fields as read from JSON.
      where: file or configuration field that holds them, for messages.

    Raises:
      CheckpointError: the architecture is not supported; a field is missing, of the wrong type,
        contradicts another, or has a value that is not supported.
    """
    for group in (mapping, mapping.get(GROUP)):
        layers = group.get("num_hidden_layers") if isinstance(group, Mapping) else None
        if isinstance(layers, int) and layers > MAX_LAYERS:  # before lists of layers are made
            raise CheckpointError(f"{where}: num_hidden_layers: must be at most {MAX_LAYERS:,}")
    own = language_model_fields(mapping, where)
    if own is not mapping:
        mapping, where = own, f"{where}: {GROUP}"
    family = _family(mapping, where)
    fields = HFFields(mapping, where, family.defaults)
    _require_constants(fields, family)
    try:
        config = family.read(fields)
    except FieldError as error:
        raise fields.error(_hf_name(error.field, mapping), error.reason) from None
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    for key, neutral in NEUTRAL_VALUES.items():
        neutral = [neutral] * config.num_layers if key == "layer_types" else neutral
        if key not in fields.seen and mapping.get(key) not in (None, neutral):
            raise fields.error(
                key, f"{mapping[key]!r} is not supported in a model of type {family.model_type!r}"
            )
    return dataclasses.replace(config, model_type=family.model_type)


def _family(mapping: Mapping[str, Any], where: str) -> Family:
    """Family of the checkpoint's model class."""
    model_type = mapping.get("model_type")
    architectures = parse(
        tuple[str, ...] | None, mapping.get("architectures"), f"{where}: architectures"
    )
    architectures = architectures or ()
    for family in FAMILIES.values():
        # Early Llama files have no model_type; a different one is a different architecture. Files
        # written by hand may have no architectures.
        if (not architectures and model_type == family.model_type) or (
            family.architecture in architectures and model_type in (None, family.model_type)
        ):
            return family
    specified = ", ".join(architectures) or "none"
    subject = f"architecture {specified} of model_type {model_type!r}"
    raise unsupported(mapping, where, subject)


def _require_constants(fields: HFFields, family: Family) -> None:
    if fields.mapping.get("quantization_config") is not None:
        raise fields.error(
            "quantization_config",
            "quantized checkpoints are not supported; use the float checkpoint that it was made "
            "from",
        )
    for key, value in family.constants.items():
        specified = fields.optional(key, Any)
        if specified not in (None, value):
            raise fields.error(
                key, f"{specified!r} is not supported in a model of type {family.model_type!r}"
            )


def _hf_name(field: str, mapping: Mapping[str, Any]) -> str:
    """Name in `config.json` of a field of `ModelConfig`."""
    if field.startswith("rope."):
        section = next((name for name in SECTIONS if mapping.get(name)), SECTIONS[0])
        return f"{section}.{field.removeprefix('rope.')}"
    return HF_NAMES.get(field, field)
