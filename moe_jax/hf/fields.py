"""The fields of a Hugging Face `config.json`, each checked when it is read."""

from collections.abc import Mapping
from typing import Any

from moe_jax.config.model import LayerType
from moe_jax.config.parse import parse, suggest
from moe_jax.errors import CheckpointError
from moe_jax.layers.activation import ACTIVATIONS


class HFFields:
    """A group of fields, and what a missing one means.

    The raw file is read, not transformers' view of it: transformers 5 and the versions before it
    state some things differently, and each fills in what a file leaves out.

    Attributes:
      mapping: the fields, as read from JSON.
      where: the file, and the group in it, for messages.
      seen: the keys that were asked for.
    """

    def __init__(self, mapping: Mapping[str, Any], where: str, defaults: Mapping[str, Any]):
        """The fields of `mapping`.

        Args:
          mapping: see the class.
          where: see the class.
          defaults: by key, what leaving the field out means.
        """
        self.mapping, self.where, self._defaults = mapping, where, defaults
        self.seen: set[str] = set()

    def error(self, key: str, reason: str) -> CheckpointError:
        """The error that refuses the field `key`, to be raised."""
        return CheckpointError(f"{self.where}: {key}: {reason}")

    def optional(self, key: str, kind: Any) -> Any:
        """The field, checked to be of type `kind`; None where it is missing or null."""
        self.seen.add(key)
        value = self.mapping.get(key)
        return None if value is None else parse(kind, value, f"{self.where}: {key}")

    def get(self, key: str, kind: Any) -> Any:
        """The field; its default where it is missing or null, an error where it has none."""
        value = self.optional(key, kind)
        if value is not None:
            return value
        if key not in self._defaults:
            raise self.error(key, "this field is required and was not given")
        return self._defaults[key]

    def has_default(self, key: str) -> bool:
        """Whether leaving the field out means something."""
        return key in self._defaults

    def nullable(self, key: str, kind: Any) -> Any:
        """The field, where null means that there is no such thing, and missing the default."""
        if key in self.mapping:
            return self.optional(key, kind)
        return self.get(key, kind)

    def group(self, key: str) -> Mapping[str, Any]:
        """A group of fields, nulls left out; empty where it is missing or null."""
        value = self.mapping.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected a group of fields, got {type(value).__name__}")
        return {name: item for name, item in value.items() if item is not None}


# FIXME docstring of the merged hf.families.fields:
# """Fields of `config.json` that several families have in common, and how they are read."""


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
"""What `config.json` calls fields of `ModelConfig`, for messages."""


def common(fields: HFFields) -> dict[str, Any]:
    """The fields of `ModelConfig` that every family states in the same way."""
    return {name: fields.get(key, kind) for name, (key, kind) in _COMMON.items()}


def activation(fields: HFFields, key: str = "hidden_act") -> str:
    """The name of the FFN's activation."""
    return known_activation(fields, key, fields.get(key, str))


def known_activation(fields: HFFields, key: str, name: str) -> str:
    """`name`, which the field `key` gives, if there is such an activation."""
    if name not in ACTIVATIONS:
        raise fields.error(key, f"{name!r} is not supported; {suggest(name, ACTIVATIONS)}")
    return name


def kv_heads_or_heads(fields: HFFields) -> int:
    """`num_key_value_heads`, which by default is as many as there are query heads."""
    kv_heads = fields.optional("num_key_value_heads", int)
    return fields.get("num_attention_heads", int) if kv_heads is None else kv_heads


def stated_kv_heads(fields: HFFields) -> int:
    """`num_key_value_heads`, where null is as many as there are query heads."""
    if "num_key_value_heads" not in fields.mapping:
        return fields.get("num_key_value_heads", int)  # refuses: a size is never filled in
    return kv_heads_or_heads(fields)


def head_dim_or_quotient(fields: HFFields) -> int:
    """`head_dim`, which by default is the model's width divided by the number of heads."""
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
    """The fields of `ModelConfig` that say which layers slide, and over how many positions.

    Args:
      fields: for messages.
      window: `sliding_window`, None if there is none.
      layer_types: each layer's kind.
    """
    if "sliding_attention" not in layer_types:
        return {"sliding_window": None, "layer_types": None}
    if window is None:
        raise fields.error("sliding_window", "must be given, since layer_types has sliding layers")
    return {"sliding_window": window, "layer_types": tuple(layer_types)}


def stated_layer_types(fields: HFFields) -> tuple[LayerType, ...] | None:
    """`layer_types`, which files of transformers 5 have, or None."""
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
