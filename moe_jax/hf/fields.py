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
        self.seen.add(key)
        value = self.mapping.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected a group of fields, got {type(value).__name__}")
        return {name: item for name, item in value.items() if item is not None}


# Fields that change the computation in some architecture, with the value at which they do not. A
# family that does not read a field accepts only this value. (Not `sliding_window`: many files of
# families without windows have it, and transformers ignores it there too.)
NEUTRAL_VALUES: dict[str, Any] = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "use_bidirectional_attention": False,
    "layer_types": "full_attention",  # in every layer
    "use_qk_norm": False,
    "qk_layernorm": False,
    "no_rope_layers": None,
    "rope_interleaved": False,
    "lm_head_bias": False,
    "attention_multiplier": None,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "num_experts": None,
    "num_local_experts": None,
    "num_kv_shared_layers": 0,
    "clip_qkv": None,
    "use_cla": False,
    "use_mla": False,
    "use_parallel_residual": False,
    "attention_chunk_size": None,
}

LAYER_TYPES: tuple[LayerType, ...] = ("full_attention", "sliding_attention")

_COMMON: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("intermediate_size", int),
    "num_layers": ("num_hidden_layers", int),
    "num_heads": ("num_attention_heads", int),
    "max_position_embeddings": ("max_position_embeddings", int),
    "tie_word_embeddings": ("tie_word_embeddings", bool),
}

HF_NAMES = {name: key for name, (key, _) in _COMMON.items()} | {
    "num_kv_heads": "num_key_value_heads",
    "qkv_bias": "attention_bias",
    "num_reader_layers": "num_kv_shared_layers",
    "reader_ffn_width": "use_double_wide_mlp",
    "layer_embedding_width": "hidden_size_per_layer_input",
    "num_key_heads": "linear_num_key_heads",
    "num_value_heads": "linear_num_value_heads",
    "key_head_dim": "linear_key_head_dim",
    "value_head_dim": "linear_value_head_dim",
    "filter_width": "linear_conv_kernel_dim",
}
"""Names in `config.json` of fields of `ModelConfig`, for messages."""


def common(fields: HFFields, norm_eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Fields of `ModelConfig` that all families state in the same way.

    Args:
      fields: fields of the file.
      norm_eps: key of `ModelConfig.rms_norm_eps`.
    """
    values = {name: fields.get(key, kind) for name, (key, kind) in _COMMON.items()}
    return values | {"rms_norm_eps": fields.get(norm_eps, float)}


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


def sliding_everywhere(fields: HFFields) -> dict[str, Any]:
    """Fields of `ModelConfig` for a `sliding_window` of all layers; null is full attention."""
    window = fields.nullable("sliding_window", int)
    kind: LayerType = "full_attention" if window is None else "sliding_attention"
    return sliding(fields, window, [kind] * fields.get("num_hidden_layers", int))


def alternating(fields: HFFields, period: int) -> list[LayerType]:
    """Sliding layers, with full attention in the last of every `period` layers."""
    if period < 1:
        raise fields.error("sliding_window_pattern", "must be positive")
    return [
        "sliding_attention" if (layer + 1) % period else "full_attention"
        for layer in range(fields.get("num_hidden_layers", int))
    ]


def factor(fields: HFFields, key: str) -> float | None:
    """Positive number by which something is multiplied; None if it is 1."""
    value = fields.get(key, float)
    if value <= 0:
        raise fields.error(key, "must be positive")
    return None if value == 1 else value


def specified_layer_types(
    fields: HFFields, known: tuple[LayerType, ...] = LAYER_TYPES
) -> tuple[LayerType, ...] | None:
    """`layer_types`, which files of transformers 5 have; None if it is missing.

    Args:
      fields: fields of the file.
      known: types that the family has.
    """
    types = fields.optional("layer_types", tuple[str, ...])
    for kind in types or ():
        if kind not in known:
            raise fields.error(
                "layer_types", f"{kind!r} is not supported; supported: {', '.join(known)}"
            )
    if types is not None and len(types) != fields.get("num_hidden_layers", int):
        raise fields.error(
            "layer_types",
            f"names {len(types)} layers, but num_hidden_layers is "
            f"{fields.get('num_hidden_layers', int)}",
        )
    return types
