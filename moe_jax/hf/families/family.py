"""Rows of key tables: which tensor of a Hugging Face checkpoint becomes which leaf of ours.

A family's table is a concatenation of the groups below, and of rows of its own where its tensors
have other names or hold several projections at once. The leaves' names are the same in all
families, so that adapters and their targets are too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import suggest
from moe_jax.errors import CheckpointError
from moe_jax.hf.fields import HFFields

LAYER = "model.layers.{layer}."
EMBEDDING_PATH, HEAD_PATH = "embed_tokens/embedding", "lm_head/kernel"

ROTARY_BUFFERS = ("model.rotary_emb.inv_freq", LAYER + "self_attn.rotary_emb.inv_freq")
"""Constants that follow from config.json, which old versions of transformers stored as tensors."""


class Condition(NamedTuple):
    """A weight exists only where a field of `ModelConfig` has a value.

    Attributes:
      field: of `ModelConfig`.
      value: the field must have.
      key: what `config.json` calls the field, for messages.
    """

    field: str
    value: Any
    key: str


@dataclass(frozen=True)
class WeightRule:
    """One row of a key table.

    Attributes:
      key: the tensor's name; `{layer}` counts decoder layers, which are stacked in the leaf.
      path: the leaf's path in the parameter tree.
      axes: the leaf's axes, without the layer axis in front, one letter each: V vocabulary, D model
        width, F FFN width, Q query channels (heads x head_dim), K key and value channels (kv heads
        x head_dim), W channels of one head.
      transposed: the tensor is stored `[out, in]` and the leaf is `[in, out]`.
      fused: where the tensor holds several leaves one after the other along its first axis, the
        letters of their sizes.
      part: which of them this leaf is.
      only_if: when the weight exists; None is always.
    """

    key: str
    path: str
    axes: str
    transposed: bool = False
    fused: str = ""
    part: int = 0
    only_if: Condition | None = None


def projection(
    name: str, axes: str, *, bias: bool = False, only_if: Condition | None = None
) -> WeightRule:
    """The kernel, or the bias, of one projection of a layer.

    Args:
      name: with its block, for example `self_attn.q_proj`.
      axes: of the kernel.
      bias: the row is the bias's.
      only_if: see `WeightRule`.
    """
    key, path = LAYER + name, f"layers/{name.replace('.', '/')}"
    if bias:
        return WeightRule(f"{key}.bias", f"{path}/bias", axes[-1], only_if=only_if)
    return WeightRule(f"{key}.weight", f"{path}/kernel", axes, True, only_if=only_if)


def fused_projections(name: str, parts: dict[str, str]) -> tuple[WeightRule, ...]:
    """The kernels of several projections that are stored as one.

    Args:
      name: of the stored tensor, with its block, for example `mlp.gate_up_proj`.
      parts: projections and the axes of their kernels, in the order of storage.
    """
    block, fused = name.split(".")[0], "".join(axes[-1] for axes in parts.values())
    return tuple(
        WeightRule(
            f"{LAYER}{name}.weight", f"layers/{block}/{part}/kernel", axes, True, fused, index
        )
        for index, (part, axes) in enumerate(parts.items())
    )


def norm(name: str, leaf: str | None = None, axes: str = "D") -> WeightRule:
    """The scale of one norm of a layer, called `leaf` by us where that is not `name`."""
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
        only_if=Condition("tie_word_embeddings", False, "tie_word_embeddings"),
    ),
)
PRE_NORMS = (norm("input_layernorm"), norm("post_attention_layernorm"))
QK_NORMS = (norm("self_attn.q_norm", axes="W"), norm("self_attn.k_norm", axes="W"))

_QKV = {"self_attn.q_proj": "DQ", "self_attn.k_proj": "DK", "self_attn.v_proj": "DK"}
_OUTPUT, _GATE = ("self_attn.o_proj", "QD"), {"mlp.gate_proj": "DF", "mlp.up_proj": "DF"}
_DOWN = ("mlp.down_proj", "FD")

QKV = tuple(projection(name, axes) for name, axes in _QKV.items())
OUTPUT = (projection(*_OUTPUT),)
ATTENTION = QKV + OUTPUT
ATTENTION_BIASES = tuple(
    projection(name, axes, bias=True, only_if=_ATTENTION_BIAS)
    for name, axes in (*_QKV.items(), _OUTPUT)
)
GATE_UP = tuple(projection(name, axes) for name, axes in _GATE.items())
DOWN = (projection(*_DOWN),)
MLP = GATE_UP + DOWN
MLP_BIASES = tuple(
    projection(name, axes, bias=True, only_if=_MLP_BIAS) for name, axes in (*_GATE.items(), _DOWN)
)
FUSED_QKV = fused_projections(
    "self_attn.qkv_proj", {"q_proj": "DQ", "k_proj": "DK", "v_proj": "DK"}
)
FUSED_GATE_UP = fused_projections("mlp.gate_up_proj", {"gate_proj": "DF", "up_proj": "DF"})


def qkv_biases(only_if: Condition | None = None) -> tuple[WeightRule, ...]:
    """Biases of the query, key and value projections, for families whose output one has none."""
    return tuple(projection(name, axes, bias=True, only_if=only_if) for name, axes in _QKV.items())


# FIXME docstring of the merged hf.families.family:
# """What a model family is to the loader, and the registry of all of them.
#
# A family is one file: a function from the fields of its `config.json` to a `ModelConfig`, decorated
# with `@model_family(...)`, which also states its key table. It may live in any package; importing
# its module is what enters it.
# """


Read = Callable[[HFFields], ModelConfig]


class Family(NamedTuple):
    """How checkpoints of one `model_type` are read.

    Attributes:
      model_type: as in `config.json` and `ModelConfig.model_type`.
      architecture: the class of the language model in `config.json`'s `architectures`.
      weights: the key table, of both directions.
      defaults: what `config.json` means by leaving a field out: the documented defaults of
        transformers' configuration class, on which files written before a field existed rely.
        Sizes of the model are never filled in.
      constants: fields that other architectures have a choice of, and this one's only value.
      read: makes the architecture of the fields.
      ignored_tensors: tensors that may be stored and are not read, see `ROTARY_BUFFERS`.
    """

    model_type: str
    architecture: str
    weights: tuple[WeightRule, ...]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any]
    read: Read
    ignored_tensors: tuple[str, ...] = ROTARY_BUFFERS


FAMILIES: dict[str, Family] = {}
"""By `model_type`."""


def model_family(
    model_type: str,
    architecture: str,
    *,
    weights: tuple[WeightRule, ...],
    defaults: Mapping[str, Any],
    constants: Mapping[str, Any] | None = None,
) -> Callable[[Read], Read]:
    """Enters the family whose configuration the decorated function reads; see `Family`.

    Raises:
      ValueError: the model_type or the architecture is taken.
    """

    def enter(read: Read) -> Read:
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

    return enter


def family_of(config: ModelConfig) -> Family:
    """The family of a model.

    Raises:
      CheckpointError: nothing of its `model_type` is registered.
    """
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type: no model family {config.model_type!r} is registered; "
            f"{suggest(config.model_type, FAMILIES)}, or import the module that enters it"
        )
    return FAMILIES[config.model_type]
