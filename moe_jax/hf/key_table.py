"""Map between the leaves of a parameter tree and the tensors of a Hugging Face checkpoint.

Both directions follow from the key table of the model's family: `base_leaves` lists the tensors of
each leaf, `tensor_parts` the leaves of each tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.config.model import ModelConfig
from moe_jax.hf.families.family import MODEL, ROTARY_BUFFER, WeightRule, family_of
from moe_jax.hf.wrapper import PREFIX


@dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree and the tensors that hold it.

    Attributes:
      path: names from the root of the tree to the leaf.
      shape: shape of the leaf, with a leading layer axis if it is `stacked`.
      keys: names of the tensors: one per layer that has the leaf if it is `stacked`, else one.
      stacked: True if tensor i is `leaf[i]`.
      transposed: True if the tensors are stored with their two axes swapped.
      first_row: offset of the leaf along the first axis of the stored tensors.
      stored_rows: length of that axis; longer than the leaf if others share the tensor.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    stacked: bool
    transposed: bool
    first_row: int
    stored_rows: int

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each stored tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return (self.stored_rows, *(shape[::-1] if self.transposed else shape)[1:])


def _axis_sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "Q": config.num_heads * config.head_dim,
        "K": config.num_kv_heads * config.head_dim,
        "W": config.head_dim,
        "1": 1,
        **_gated_sizes(config),
        **_global_sizes(config),
        **_layer_embedding_sizes(config),
        "U": config.reader_ffn_width or 0,
    }


def _gated_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of a family with gated attention and Gated DeltaNet."""
    net = config.delta_net
    if net is None:
        return {}
    return {
        "G": 2 * config.num_heads * config.head_dim,
        "C": net.mixed_dim,
        "Z": net.value_dim,
        "H": net.num_value_heads,
        "Y": net.value_head_dim,
        "T": net.filter_width,
    }


def _global_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of layers whose full attention differs from sliding attention."""
    sizes = config.global_attention
    if sizes is None:
        return {}
    return {
        "A": config.num_heads * sizes.head_dim,
        "B": sizes.num_kv_heads * sizes.head_dim,
        "X": sizes.head_dim,
    }


def _layer_embedding_sizes(config: ModelConfig) -> dict[str, int]:
    """Sizes of a family with embeddings of each layer."""
    width = config.layer_embedding_width
    return {} if width is None else {"P": width, "L": config.num_layers * width}


def base_leaves(config: ModelConfig) -> list[Leaf]:
    """Leaves of the parameter tree of a model.

    Raises:
      CheckpointError: its family is not registered.
    """
    return [_leaf(rule, config) for rule in family_of(config).weights if _exists(rule, config)]


def _exists(rule: WeightRule, config: ModelConfig) -> bool:
    return rule.condition is None or getattr(config, rule.condition.field) == rule.condition.value


def _leaf(rule: WeightRule, config: ModelConfig) -> Leaf:
    sizes = _axis_sizes(config)
    shape, stacked = tuple(sizes[axis] for axis in rule.axes), "{layer}" in rule.key
    path = tuple(rule.path.split("/"))
    layers = config.layers_with(path[1]) if stacked else ()
    rows = [sizes[axis] for axis in rule.fused] or [shape[-1] if rule.transposed else shape[0]]
    return Leaf(
        path=path,
        shape=(len(layers), *shape) if stacked else shape,
        keys=tuple(rule.key.format(layer=layer) for layer in layers) if stacked else (rule.key,),
        stacked=stacked,
        transposed=rule.transposed,
        first_row=sum(rows[: rule.part]),
        stored_rows=sum(rows),
    )


def tensor_names(pattern: str, config: ModelConfig) -> tuple[str, ...]:
    """Names of the tensors of all layers for a pattern with `{layer}`; else the pattern itself."""
    if "{layer}" not in pattern:
        return (pattern,)
    return tuple(pattern.format(layer=layer) for layer in range(config.num_layers))


def tensor_name(path: str, config: ModelConfig) -> str | None:
    """Name of the tensor of an unstacked leaf, even if this model lacks it.

    None if the family has no such leaf.
    """
    return next((rule.key for rule in family_of(config).weights if rule.path == path), None)


def by_tensor_name(stored: Iterable[str], config: ModelConfig) -> dict[str, list[str]]:
    """Stored names by the name of their tensor in the key table, or else their own name.

    As transformers does, `model.` is added to names of a decoder that was saved alone, and a
    doubled one is taken off; so is the prefix of a language model within a larger one.
    """
    known = {key for rule in family_of(config).weights for key in tensor_names(rule.key, config)}
    modules = {key.removeprefix(MODEL).partition(".")[0] for key in known if key.startswith(MODEL)}
    names: dict[str, list[str]] = {}
    for key in stored:
        bare = PREFIX.sub("", key)
        shorter = bare.removeprefix(MODEL)
        name = MODEL + bare if bare.partition(".")[0] in modules else bare
        name = shorter if shorter in known else name
        names.setdefault(name, []).append(key)
    return names


_UNREAD_BY_READERS = tuple(f"self_attn.{name}" for name in ("k_proj", "v_proj", "k_norm", "v_norm"))
"""Modules that checkpoints store for layers without keys and values of their own."""


def is_beside_model(key: str, config: ModelConfig) -> bool:
    """True if the model computes the same without the tensor `key`, which is not in its table.

    Such are other heads, layers beyond the last, constants that are computed here, and keys and
    values of layers that attend to those of earlier layers.
    """
    rules = family_of(config).weights
    prefixes = {rule.key.partition("{layer}")[0] for rule in rules if "{layer}" in rule.key}
    for prefix in prefixes:
        number = key.removeprefix(prefix).partition(".")[0]
        if key.startswith(prefix) and number.isdecimal() and int(number) < config.num_layers:
            layer, *rest = key.removeprefix(prefix).split(".")
            return ROTARY_BUFFER.search(key) is not None or (
                int(layer) in config.reader_layers and ".".join(rest[:2]) in _UNREAD_BY_READERS
            )
    return key.rpartition(".")[0] not in {rule.key.rpartition(".")[0] for rule in rules}


def module_counts(tensors: Iterable[str]) -> list[str]:
    """Modules of tensors, each with the number of its tensors; a single tensor by its name.

    A module is the first part of the names behind `model.`, and of layers also their number.
    """
    modules: dict[str, list[str]] = {}
    for name in tensors:
        path = PREFIX.sub("", name).removeprefix(MODEL).split(".")
        modules.setdefault(".".join(path[: 2 if path[0] == "layers" else 1]), []).append(name)
    return [
        names[0] if len(names) == 1 else f"{module} ({len(names)} tensors)"
        for module, names in modules.items()
    ]


def unexpected_reason(key: str, config: ModelConfig) -> str:
    """Reason for which a model of this configuration has no tensor `key`, for a message."""
    family = family_of(config)
    for rule in family.weights:
        if not _exists(rule, config) and key in tensor_names(rule.key, config):
            condition = rule.condition
            assert condition is not None
            value = str(getattr(config, condition.field)).lower()
            return f"config.json says {condition.key} {value}"
    return f"a model of type {family.model_type!r} has no such weights"


TensorParts = tuple[tuple[Leaf, int], ...]
"""Leaves of one tensor in the order of storage, each with the index of the tensor in its keys."""


def tensor_parts(config: ModelConfig) -> dict[str, TensorParts]:
    """Parts of all tensors of a checkpoint, by name, in the order of the key table."""
    parts: dict[str, list[tuple[Leaf, int]]] = {}
    for leaf in base_leaves(config):
        for index, key in enumerate(leaf.keys):
            parts.setdefault(key, []).append((leaf, index))
    return {
        key: tuple(sorted(shared, key=lambda part: part[0].first_row))
        for key, shared in parts.items()
    }


def hf_tensor(params: Any, parts: TensorParts) -> np.ndarray:
    """One tensor as Hugging Face stores it; only its part of the leaves is copied.

    Args:
      params: parameter tree.
      parts: entry of the tensor in `tensor_parts`.
    """
    arrays = []
    for leaf, index in parts:
        array = params
        for name in leaf.path:
            array = array[name]
        array = np.asarray(array[index] if leaf.stacked else array)
        arrays.append(array.T if leaf.transposed else array)
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def hf_tensors(params: Any, config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors of the Hugging Face checkpoint of a parameter tree; inverse of `load_base_params`."""
    return {key: hf_tensor(params, parts) for key, parts in tensor_parts(config).items()}
