"""The registry of model families, and the rows of their key tables.

A family is one file: a function from the fields of its `config.json` to a `ModelConfig`, decorated
with `@model_family(...)`, which also specifies its key table. It may live in any package; importing
its module registers it.

A key table maps tensors of a Hugging Face checkpoint to leaves of the parameter tree. It
concatenates the groups of rows below, and rows of the family where its tensors have other names or
hold several projections. Leaves have the same names in all families, and so have adapter targets.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import suggest
from moe_jax.errors import CheckpointError
from moe_jax.hf.fields import HFFields

MODEL = "model."
"""Prefix of the decoder's tensors, without which the decoder alone is saved."""

LAYER = MODEL + "layers.{layer}."
EMBEDDING_PATH, HEAD_PATH = "embed_tokens/embedding", "lm_head/kernel"

ROTARY_BUFFER = re.compile(r"\brotary_emb\.(inv_freq|cos_cached|sin_cached)$")
"""Constants derived from config.json that old versions of transformers stored as tensors."""


class Condition(NamedTuple):
    """Condition for a weight to exist: a field of `ModelConfig` has a value.

    Attributes:
      field: name of the field.
      value: required value.
      key: name of the field in `config.json`, for messages.
    """

    field: str
    value: Any
    key: str


@dataclass(frozen=True)
class WeightRule:
    """One row of a key table.

    Attributes:
      key: name of the tensor; `{layer}` is the decoder layer, stacked in the leaf.
      path: path of the leaf in the parameter tree.
      axes: axes of the leaf without the leading layer axis, one letter each: V vocabulary, D hidden
        size, F FFN size, Q query channels (heads x head_dim), K key and value channels (kv heads x
        head_dim), W channels of one head. Of Gated DeltaNet: G query channels and their gates, C
        channels of queries, keys and values, Z value channels, H value heads, Y channels of one, T
        width of the convolution's filters. Of `global_attn`: A query channels, B key and value
        channels, X channels of one head. Of embeddings of each layer: P channels of one, L channels
        of all. U width of the wide FFN. And 1.
      transposed: True if the tensor is stored `[out, in]` and the leaf is `[in, out]`.
      fused: letters of the sizes of all leaves, if the tensor concatenates several leaves along its
        first axis.
      part: index of this leaf among them.
      condition: condition for the weight to exist; None is always.
    """

    key: str
    path: str
    axes: str
    transposed: bool = False
    fused: str = ""
    part: int = 0
    condition: Condition | None = None


def projection(
    name: str, axes: str, *, bias: bool = False, condition: Condition | None = None
) -> WeightRule:
    """Row for the kernel or the bias of one projection of a layer.

    Args:
      name: block and projection, for example `self_attn.q_proj`.
      axes: axes of the kernel.
      bias: True for the bias.
      condition: see `WeightRule`.
    """
    key, path = LAYER + name, f"layers/{name.replace('.', '/')}"
    if bias:
        return WeightRule(f"{key}.bias", f"{path}/bias", axes[-1], condition=condition)
    return WeightRule(f"{key}.weight", f"{path}/kernel", axes, True, condition=condition)


def fused_projections(
    name: str, parts: dict[str, str], block: str | None = None
) -> tuple[WeightRule, ...]:
    """Rows for the kernels of several projections that are stored as one tensor.

    Args:
      name: block and name of the tensor, for example `mlp.gate_up_proj`.
      parts: projections and the axes of their kernels, in the order of storage.
      block: name of the block here, if it is not that of `name`.
    """
    block, fused = block or name.split(".")[0], "".join(axes[-1] for axes in parts.values())
    return tuple(
        WeightRule(
            f"{LAYER}{name}.weight", f"layers/{block}/{part}/kernel", axes, True, fused, index
        )
        for index, (part, axes) in enumerate(parts.items())
    )


def norm(name: str, leaf: str | None = None, axes: str = "D") -> WeightRule:
    """Row for the scale of one norm of a layer; `leaf` is its name here if it is not `name`."""
    path = (name if leaf is None else leaf).replace(".", "/")
    return WeightRule(f"{LAYER}{name}.weight", f"layers/{path}/scale", axes)


_ATTENTION_BIAS = Condition("attention_bias", True, "attention_bias")
_MLP_BIAS = Condition("mlp_bias", True, "mlp_bias")

EMBEDDING = (WeightRule("model.embed_tokens.weight", EMBEDDING_PATH, "VD"),)
HEAD = (
    WeightRule("model.norm.weight", "norm/scale", "D"),
    WeightRule(
        "lm_head.weight",
        HEAD_PATH,
        "DV",
        True,
        condition=Condition("tie_word_embeddings", False, "tie_word_embeddings"),
    ),
)
PRE_NORMS = (norm("input_layernorm"), norm("post_attention_layernorm"))
# Of families without norms before attention and FFN; `post_attention_layernorm` follows attention.
OUTPUT_NORMS = (
    norm("post_attention_layernorm", "post_self_attn_layernorm"),
    norm("post_feedforward_layernorm", "post_mlp_layernorm"),
)
QK_NORMS = (norm("self_attn.q_norm", axes="W"), norm("self_attn.k_norm", axes="W"))

_QKV = {"self_attn.q_proj": "DQ", "self_attn.k_proj": "DK", "self_attn.v_proj": "DK"}
_OUTPUT, _GATE = ("self_attn.o_proj", "QD"), {"mlp.gate_proj": "DF", "mlp.up_proj": "DF"}
_DOWN = ("mlp.down_proj", "FD")

QKV = tuple(projection(name, axes) for name, axes in _QKV.items())
OUTPUT = (projection(*_OUTPUT),)
ATTENTION = QKV + OUTPUT
ATTENTION_BIASES = tuple(
    projection(name, axes, bias=True, condition=_ATTENTION_BIAS)
    for name, axes in (*_QKV.items(), _OUTPUT)
)
GATE_UP = tuple(projection(name, axes) for name, axes in _GATE.items())
DOWN = (projection(*_DOWN),)
MLP = GATE_UP + DOWN
MLP_BIASES = tuple(
    projection(name, axes, bias=True, condition=_MLP_BIAS) for name, axes in (*_GATE.items(), _DOWN)
)
FUSED_QKV = fused_projections(
    "self_attn.qkv_proj", {"q_proj": "DQ", "k_proj": "DK", "v_proj": "DK"}
)
FUSED_GATE_UP = fused_projections("mlp.gate_up_proj", {"gate_proj": "DF", "up_proj": "DF"})


def qkv_biases(condition: Condition | None = None) -> tuple[WeightRule, ...]:
    """Rows for biases of the query, key and value projections, without the output projection's."""
    return tuple(
        projection(name, axes, bias=True, condition=condition) for name, axes in _QKV.items()
    )


ConfigReader = Callable[[HFFields], ModelConfig]


class Family(NamedTuple):
    """Rules for reading checkpoints of one `model_type`.

    Attributes:
      model_type: value in `config.json` and `ModelConfig.model_type`.
      architecture: class of the language model in `architectures` of `config.json`.
      weights: key table, for both directions.
      defaults: values of fields that `config.json` leaves out: the documented defaults of
        transformers' configuration class, on which files written before a field existed rely.
        Sizes of the model have no defaults.
      constants: the only supported value of fields that vary in other architectures.
      read: function from the fields to the architecture.
    """

    model_type: str
    architecture: str
    weights: tuple[WeightRule, ...]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any]
    read: ConfigReader


FAMILIES: dict[str, Family] = {}
"""Registered families by `model_type`."""


def model_family(
    model_type: str,
    architecture: str,
    *,
    weights: tuple[WeightRule, ...],
    defaults: Mapping[str, Any],
    constants: Mapping[str, Any] | None = None,
) -> Callable[[ConfigReader], ConfigReader]:
    """Registers the family whose configuration the decorated function reads; see `Family`.

    Raises:
      ValueError: the model_type or the architecture is taken.
    """

    def register(read: ConfigReader) -> ConfigReader:
        for family in FAMILIES.values():
            if model_type == family.model_type or architecture == family.architecture:
                raise ValueError(
                    f"the model family {model_type!r} ({architecture}) is taken by "
                    f"{family.read.__module__}; register another"
                )
        FAMILIES[model_type] = Family(
            model_type, architecture, weights, defaults, constants or {}, read
        )
        return read

    return register


def family_of(config: ModelConfig) -> Family:
    """Family of a model.

    Raises:
      CheckpointError: its `model_type` is not registered.
    """
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type: no model family {config.model_type!r} is registered; "
            f"{suggest(config.model_type, FAMILIES)}, or import the module that registers it"
        )
    return FAMILIES[config.model_type]
