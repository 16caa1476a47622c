"""Reads how a Hugging Face `config.json` states rotary position embeddings.

transformers 5 keeps them in `rope_parameters`, by kind of layer where the kinds differ; versions
before it had `rope_theta` and `rope_scaling`.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from moe_jax.config.model import RopeConfig
from moe_jax.config.parse import FieldError, parse, suggest
from moe_jax.errors import CheckpointError
from moe_jax.hf.fields import HFFields
from moe_jax.layers.rope import ROPE_TYPES

# The fields of each rope_type beside rope_theta; a further known field is of another type and not
# read, as in transformers.
_FIELDS: dict[str, dict[str, Any]] = {
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
    "longrope": {
        "factor": float,
        "original_max_position_embeddings": int,
        "attention_factor": float,
        "short_factor": tuple[float, ...],
        "long_factor": tuple[float, ...],
    },
}
# `finetuned` is a note in the files of the first YaRN models; transformers does not read it either.
_NOTES = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})

SECTIONS = ("rope_parameters", "rope_scaling")


class RopeRules(NamedTuple):
    """How a family reads rotary embeddings.

    Attributes:
      partial_rotary_factor: what leaving the field out means; None where the family always rotates
        whole heads, and the field, if there, must say so.
      interleaved: see `RopeConfig`.
      types: what may be meant; `rope_type`s.
      renamed: former names of types, by name.
    """

    partial_rotary_factor: float | None = None
    interleaved: bool = False
    types: Collection[str] = tuple(ROPE_TYPES)
    renamed: Mapping[str, str] = {}


WHOLE_HEADS = RopeRules()


def rope_section(fields: HFFields) -> tuple[str, Mapping[str, Any]]:
    """The name and the fields of the section that describes rotary embeddings; nulls left out."""
    sections = {name: fields.group(name) for name in SECTIONS if fields.group(name)}
    if len(sections) == 2 and sections["rope_parameters"] != sections["rope_scaling"]:
        raise CheckpointError(
            f"{fields.where}: rope_parameters contradicts rope_scaling; keep one of them"
        )
    return next(iter(sections.items()), ("rope_scaling", {}))


def read_rope(fields: HFFields, rules: RopeRules = WHOLE_HEADS) -> RopeConfig:
    """The rotary embedding of a model all of whose layers have the same."""
    name, section = rope_section(fields)
    return rope_of_section(fields, name, section, rules)


def rope_of_section(
    fields: HFFields,
    name: str,
    section: Mapping[str, Any],
    rules: RopeRules,
    theta_key: str = "rope_theta",
) -> RopeConfig:
    """The rotary embedding that a section states.

    Args:
      fields: around the section.
      name: of the section, for messages.
      section: without nulls.
      rules: of the family.
      theta_key: what rope_theta is called where it stands beside the section; its default is the
        family's.
    """
    at = f"{fields.where}: {name}"
    known = {field for names in _FIELDS.values() for field in names} | _NOTES
    for field in section:
        if field not in known:
            raise CheckpointError(f"{at}.{field}: unknown field; {suggest(field, known)}")
    rope_type = _rope_type(section, at, rules)
    values = {
        field: parse(kind, section[field], f"{at}.{field}")
        for field, kind in _FIELDS[rope_type].items()
        if field in section
    }
    if "original_max_position_embeddings" in _FIELDS[rope_type]:
        values["original_max_position_embeddings"] = _original_length(fields, section, at)
    try:
        return RopeConfig(
            rope_type=parse(Any, rope_type),
            rope_theta=_theta(fields, section, at, theta_key),
            partial_rotary_factor=_partial_rotary_factor(fields, section, at, rules),
            interleaved=rules.interleaved,
            **values,
        )
    except FieldError as error:
        raise CheckpointError(f"{at}.{error.field}: {error.reason}") from None


def _rope_type(section: Mapping[str, Any], at: str, rules: RopeRules) -> str:
    stated, former = section.get("rope_type"), section.get("type")
    if former is not None and stated not in (None, former):
        raise CheckpointError(
            f"{at}: type {former!r} contradicts rope_type {stated!r}; keep one of them"
        )
    rope_type = stated or former
    if rope_type is None:
        if set(section) - _NOTES:
            raise CheckpointError(
                f"{at}: has no rope_type; say which of {', '.join(rules.types)} is meant"
            )
        return "default"
    rope_type = rules.renamed.get(rope_type, rope_type)
    if rope_type not in rules.types:
        raise CheckpointError(
            f"{at}.rope_type: {rope_type!r} is not supported; supported: {', '.join(rules.types)}"
        )
    return rope_type


def _original_length(fields: HFFields, section: Mapping[str, Any], at: str) -> int:
    """The length before scaling, which transformers takes from beside the section first."""
    key = "original_max_position_embeddings"
    inside = parse(int | None, section.get(key), f"{at}.{key}")
    beside = fields.optional(key, int)
    if beside is not None:
        return beside
    if not fields.has_default(key):
        return fields.get("max_position_embeddings", int) if inside is None else inside
    default = fields.get(key, int)
    if inside not in (None, default):
        raise CheckpointError(
            f"{at}.{key}: {inside} is not read here, where transformers takes {default} for a "
            f"missing {key} beside {at.rsplit(' ', 1)[-1]}; move it there"
        )
    return default


def _theta(fields: HFFields, section: Mapping[str, Any], at: str, key: str) -> float:
    inside = parse(float | None, section.get("rope_theta"), f"{at}.rope_theta")
    beside = fields.optional(key, float)
    if inside is not None and beside is not None and inside != beside:
        raise CheckpointError(f"{at}.rope_theta: {inside} contradicts {key} {beside}; keep one")
    return fields.get(key, float) if inside is None else inside


def _partial_rotary_factor(
    fields: HFFields, section: Mapping[str, Any], at: str, rules: RopeRules
) -> float:
    key = "partial_rotary_factor"
    inside = parse(float | None, section.get(key), f"{at}.{key}")
    beside = fields.optional(key, float)
    if inside is not None and beside is not None and inside != beside:
        raise CheckpointError(f"{at}.{key}: {inside} contradicts {key} {beside}; keep one")
    stated = beside if inside is None else inside
    if rules.partial_rotary_factor is None:
        if stated not in (None, 1):
            raise CheckpointError(
                f"{fields.where if inside is None else at}: {key}: only 1.0 is supported"
            )
        return 1.0
    return rules.partial_rotary_factor if stated is None else stated
