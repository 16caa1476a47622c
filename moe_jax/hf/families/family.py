"""What a model family is to the loader, and the registry of all of them.

A family is one file: a function from the fields of its `config.json` to a `ModelConfig`, decorated
with `@model_family(...)`, which also states its key table. It may live in any package; importing
its module is what enters it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import suggest
from moe_jax.errors import CheckpointError
from moe_jax.hf.families.weights import ROTARY_BUFFERS, WeightRule
from moe_jax.hf.fields import HFFields

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
      not_weights: tensors that may be stored and are not read, see `ROTARY_BUFFERS`.
    """

    model_type: str
    architecture: str
    weights: tuple[WeightRule, ...]
    defaults: Mapping[str, Any]
    constants: Mapping[str, Any]
    read: Read
    not_weights: tuple[str, ...] = ROTARY_BUFFERS


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
