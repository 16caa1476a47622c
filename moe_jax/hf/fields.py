"""Fields of a Hugging Face `config.json`, checked when they are read.

`HFFields` holds the fields of one file. The functions below it read those that several families
state in the same way.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.config.model import LayerType
from moe_jax.config.parse import parse, suggest
from moe_jax.errors import CheckpointError
from moe_jax.layers.activation import ACTIVATIONS


class HFFields:
    """A group of fields and the defaults of missing ones.

    It holds the raw file, not transformers' configuration object: transformers 5 and the versions
    before it state some fields differently, and each fills in defaults.

    Attributes:
      mapping: fields as read from JSON.
      where: file, and group in it, for messages.
      seen: keys that were read.
    """

    def __init__(self, mapping: Mapping[str, Any], where: str, defaults: Mapping[str, Any]):
        """Wraps `mapping`.

        Args:
          mapping: fields as read from JSON.
          where: file, and group in it, for messages.
          defaults: values of missing fields, by key.
        """
        self.mapping, self.where, self._defaults = mapping, where, defaults
        self.seen: set[str] = set()

    def error(self, key: str, reason: str) -> CheckpointError:
        """Returns an error about the field `key`, to be raised."""
        return CheckpointError(f"{self.where}: {key}: {reason}")

    def optional(self, key: str, kind: Any) -> Any:
        """Field of type `kind`; None if it is missing or null."""
        self.seen.add(key)
        value = self.mapping.get(key)
        return None if value is None else parse(kind, value, f"{self.where}: {key}")

    def get(self, key: str, kind: Any) -> Any:
        """Field of type `kind`; its default if it is missing or null, an error without default."""
        value = self.optional(key, kind)
        if value is not None:
            return value
        if key not in self._defaults:
            raise self.error(key, "this field is required and was not given")
        return self._defaults[key]

    def has_default(self, key: str) -> bool:
        """True if the field may be left out."""
        return key in self._defaults

    def nullable(self, key: str, kind: Any) -> Any:
        """Field of type `kind`, or None if it is null; its default if it is missing."""
        if key in self.mapping:
            return self.optional(key, kind)
        return self.get(key, kind)

    def group(self, key: str) -> Mapping[str, Any]:
        """Group of fields without nulls; empty if it is missing or null."""
        value = self.mapping.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected a group of fields, got {type(value).__name__}")
        return {name: item for name, item in value.items() if item is not None}


LAYER_TYPES: tuple[LayerType, ...] = ("full_attention", "sliding_attention")

_COMMON: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("intermediate_size", int),
    "num_layers": ("num_hidden_layers", int),
    "num_heads": ("num_attention_heads", int),
    "max_position_embeddings": ("max_position_embeddings", int),
    "rms_norm_eps": ("rms_norm_eps", float),
    "tie_word_embeddings": ("tie_word_embeddings", bool),
}

HF_NAMES = {name: key for name, (key, _) in _COMMON.items()} | {
    "num_kv_heads": "num_key_value_heads",
    "qkv_bias": "attention_bias",
}
"""Names in `config.json` of fields of `ModelConfig`, for messages."""


def common(fields: HFFields) -> dict[str, Any]:
    """Fields of `ModelConfig` that all families state in the same way."""
    return {name: fields.get(key, kind) for name, (key, kind) in _COMMON.items()}


def activation(fields: HFFields, key: str = "hidden_act") -> str:
    """Name of the FFN's activation."""
    return supported_activation(fields, key, fields.get(key, str))


def supported_activation(fields: HFFields, key: str, name: str) -> str:
    """Checks that `name`, from the field `key`, is an activation."""
    if name not in ACTIVATIONS:
        raise fields.error(key, f"{name!r} is not supported; {suggest(name, ACTIVATIONS)}")
    return name


def kv_heads_or_heads(fields: HFFields) -> int:
    """`num_key_value_heads`, by default the number of query heads."""
    kv_heads = fields.optional("num_key_value_heads", int)
    return fields.get("num_attention_heads", int) if kv_heads is None else kv_heads


def specified_kv_heads(fields: HFFields) -> int:
    """`num_key_value_heads`, which must be given; null is the number of query heads."""
    if "num_key_value_heads" not in fields.mapping:
        return fields.get("num_key_value_heads", int)  # raises: sizes have no default
    return kv_heads_or_heads(fields)


def head_dim_or_quotient(fields: HFFields) -> int:
    """`head_dim`, by default the hidden size divided by the number of heads."""
    head_dim = fields.optional("head_dim", int)
    if head_dim is not None:
        return head_dim
    width, heads = fields.get("hidden_size", int), fields.get("num_attention_heads", int)
    if heads < 1 or width % heads:
        raise fields.error(
            "hidden_size",
            f"{width} is not a multiple of num_attention_heads ({heads}), and head_dim is not "
            f"given",
        )
    return width // heads


def sliding(
    fields: HFFields, window: int | None, layer_types: tuple[LayerType, ...] | list[LayerType]
) -> dict[str, Any]:
    """Fields of `ModelConfig` for sliding windows.

    Args:
      fields: fields of the file, for messages.
      window: `sliding_window`; None if there is no window.
      layer_types: type of each layer.
    """
    if "sliding_attention" not in layer_types:
        return {"sliding_window": None, "layer_types": None}
    if window is None:
        raise fields.error("sliding_window", "must be given, since layer_types has sliding layers")
    return {"sliding_window": window, "layer_types": tuple(layer_types)}


def specified_layer_types(fields: HFFields) -> tuple[LayerType, ...] | None:
    """`layer_types`, which files of transformers 5 have; None if it is missing."""
    types = fields.optional("layer_types", tuple[str, ...])
    for kind in types or ():
        if kind not in LAYER_TYPES:
            raise fields.error(
                "layer_types", f"{kind!r} is not supported; supported: {', '.join(LAYER_TYPES)}"
            )
    if types is not None and len(types) != fields.get("num_hidden_layers", int):
        raise fields.error(
            "layer_types",
            f"names {len(types)} layers, but num_hidden_layers is "
            f"{fields.get('num_hidden_layers', int)}",
        )
    return types
