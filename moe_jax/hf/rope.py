"""Reads the rotary position embeddings of a Hugging Face `config.json`.

transformers 5 keeps them in `rope_parameters`, by layer type where the types differ; earlier
versions had `rope_theta` and `rope_scaling`.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from moe_jax.config.parse import FieldError, parse, suggest
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import CheckpointError
from moe_jax.hf.fields import HFFields
from moe_jax.layers.rope import ROPE_TYPES

# Fields of each rope_type beside rope_theta. Known fields of other types are ignored, as in
# transformers.
_FIELDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": float},
    "dynamic": {"factor": float},
    "proportional": {"factor": float},
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
# `finetuned` is a note in the files of the first YaRN models; transformers ignores it too.
_NOTES = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})

SECTIONS = ("rope_parameters", "rope_scaling")


class RopeRules(NamedTuple):
    """A family's rules for reading rotary embeddings.

    Attributes:
      partial_rotary_factor: default of the field; None if the family always rotates whole heads, so
        that the field must be absent or 1.
      interleaved: see `RopeConfig`.
      types: supported values of `rope_type`.
      renamed: map from former names of types to current ones.
      own_fields: types of fields that this family alone computes, by key.
      ignored: fields of the section that do not change the positions of text.
    """

    partial_rotary_factor: float | None = None
    interleaved: bool = False
    types: Collection[str] = tuple(ROPE_TYPES)
    renamed: Mapping[str, str] = {}
    own_fields: Mapping[str, Any] = {}
    ignored: Collection[str] = ()


WHOLE_HEADS = RopeRules()


def rope_section(fields: HFFields) -> tuple[str, Mapping[str, Any]]:
    """Name and fields, without nulls, of the section that describes rotary embeddings."""
    sections = {name: fields.group(name) for name in SECTIONS if fields.group(name)}
    if len(sections) == 2 and sections["rope_parameters"] != sections["rope_scaling"]:
        raise CheckpointError(
            f"{fields.where}: rope_parameters contradicts rope_scaling; keep one of them"
        )
    return next(iter(sections.items()), ("rope_scaling", {}))


def read_rope(fields: HFFields, rules: RopeRules = WHOLE_HEADS) -> RopeConfig:
    """Reads the rotary embedding of a model with the same one in all layers."""
    name, section = rope_section(fields)
    return rope_of_section(fields, name, section, rules)


def rope_of_section(
    fields: HFFields,
    name: str,
    section: Mapping[str, Any],
    rules: RopeRules,
    theta_key: str = "rope_theta",
) -> RopeConfig:
    """Reads the rotary embedding of one section.

    Args:
      fields: fields that contain the section.
      name: name of the section, for messages.
      section: fields of the section, without nulls.
      rules: rules of the family.
      theta_key: key of rope_theta outside the section; its default is the family's.
    """
    location = f"{fields.where}: {name}"
    known = {field for names in _FIELDS.values() for field in names} | _NOTES
    known |= rules.own_fields.keys()
    for field in section:
        if field not in known and field not in rules.ignored:
            raise CheckpointError(f"{location}.{field}: unknown field; {suggest(field, known)}")
    rope_type = _rope_type(section, location, rules)
    values = {
        field: parse(kind, section[field], f"{location}.{field}")
        for field, kind in {**_FIELDS[rope_type], **rules.own_fields}.items()
        if field in section
    }
    if "original_max_position_embeddings" in _FIELDS[rope_type]:
        values["original_max_position_embeddings"] = _original_length(fields, section, location)
    try:
        return RopeConfig(
            rope_type=parse(Any, rope_type),
            rope_theta=_theta(fields, section, location, theta_key),
            partial_rotary_factor=_partial_rotary_factor(fields, section, location, rules),
            interleaved=rules.interleaved,
            **values,
        )
    except FieldError as error:
        raise CheckpointError(f"{location}.{error.field}: {error.reason}") from None


def _rope_type(section: Mapping[str, Any], location: str, rules: RopeRules) -> str:
    specified, former = (
        parse(str | None, section.get(key), f"{location}.{key}") for key in ("rope_type", "type")
    )
    if former is not None and specified not in (None, former):
        raise CheckpointError(
            f"{location}: type {former!r} contradicts rope_type {specified!r}; keep one of them"
        )
    rope_type = specified or former
    if rope_type is None:
        if set(section) - _NOTES - set(rules.ignored):
            raise CheckpointError(
                f"{location}: has no rope_type; give one of {', '.join(rules.types)}"
            )
        return "default"
    rope_type = rules.renamed.get(rope_type, rope_type)
    if rope_type not in rules.types:
        raise CheckpointError(
            f"{location}.rope_type: {rope_type!r} is not supported; "
            f"supported: {', '.join(rules.types)}"
        )
    return rope_type


def _original_length(fields: HFFields, section: Mapping[str, Any], location: str) -> int:
    """Length before scaling; like transformers, prefers the field outside the section."""
    key = "original_max_position_embeddings"
    inside = parse(int | None, section.get(key), f"{location}.{key}")
    outside = fields.optional(key, int)
    if outside is not None:
        return outside
    if not fields.has_default(key):
        return fields.get("max_position_embeddings", int) if inside is None else inside
    default = fields.get(key, int)
    if inside not in (None, default):
        raise CheckpointError(
            f"{location}.{key}: {inside} is ignored, since transformers uses {default} "
            f"for a missing {key} outside {location.rsplit(' ', 1)[-1]}; move it there"
        )
    return default


def _theta(fields: HFFields, section: Mapping[str, Any], location: str, key: str) -> float:
    inside = parse(float | None, section.get("rope_theta"), f"{location}.rope_theta")
    outside = fields.optional(key, float)
    if inside is not None and outside is not None and inside != outside:
        raise CheckpointError(
            f"{location}.rope_theta: {inside} contradicts {key} {outside}; keep one"
        )
    return fields.get(key, float) if inside is None else inside


def _partial_rotary_factor(
    fields: HFFields, section: Mapping[str, Any], location: str, rules: RopeRules
) -> float:
    key = "partial_rotary_factor"
    inside = parse(float | None, section.get(key), f"{location}.{key}")
    outside = fields.optional(key, float)
    if inside is not None and outside is not None and inside != outside:
        raise CheckpointError(f"{location}.{key}: {inside} contradicts {key} {outside}; keep one")
    specified = outside if inside is None else inside
    if rules.partial_rotary_factor is None:
        if specified not in (None, 1):
            raise CheckpointError(
                f"{fields.where if inside is None else location}: {key}: only 1.0 is supported"
            )
        return 1.0
    return rules.partial_rotary_factor if specified is None else specified
