"""The low-rank pairs in a PEFT adapter's weights file, as leaves of one rank and scale.

PEFT stores a pair for each module that it adapts, for example

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight         A, [R, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight         B, [out, R]
    base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector DoRA's magnitude, [out]

State dicts of peft's model also have the adapter's name, `lora_A.default.weight`, a model that was
wrapped twice a doubled `base_model.model.`, a compiled one `_orig_mod.`, and a model that also
reads images the prefix of the language model in it.

Here a method has one rank R and one scale s. A smaller pair is padded with zeros, another scale is
folded into B, and a module without a pair gets one of zeros, with DoRA the norms of its base as
magnitudes. A pair on a fused projection becomes pairs of its parts with the same A.
"""

import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.lora.dora import column_norms
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.checkpoints.leaves import LeafSpec
from moe_jax.config.model import ModelConfig
from moe_jax.errors import CheckpointError
from moe_jax.exchange.adapter_folder import AdapterFolder, require_finite
from moe_jax.exchange.peft_modules import PairSize, kernels, modules_of
from moe_jax.hf.base_model import BaseModel
from moe_jax.hf.families.family import MODEL
from moe_jax.hf.key_table import Leaf
from moe_jax.hf.load import checked_leaves, read_leaf
from moe_jax.hf.shards import name_list, open_shards
from moe_jax.hf.wrapper import PREFIX

MERGE = (
    "merge it with peft, PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(FOLDER), and use FOLDER as a base"
)
"""Remedy for an adapter that is more than pairs."""

_A, _B, _MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
_NAME = re.compile(
    rf"(?:base_model\.model\.|_orig_mod\.|module\.)*(?P<module>.*)\.(?P<leaf>{_A}|{_B}|{_MAGNITUDE})"
    r"(?:\.(?P<adapter>[^.]+))??(?:\.(?P<kind>weight|bias))?"
)
_LAYER = re.compile(r"(?:^|.*?\.)layers\.(\d+)\.")

Pairs = dict[str, dict[str, str]]
"""Names of the tensors of each module's pair, by `lora_A`, `lora_B` and `lora_magnitude_vector`."""


def checked_pairs(
    source: AdapterFolder,
    adapted: Mapping[str, PairSize],
    low_rank: LowRankConfig,
    model: ModelConfig,
    base: str,
) -> Pairs:
    """The tensors of an adapter, after checking that they are those of the adapted modules.

    Args:
      source: the adapter's folder.
      adapted: from `adapted_modules`.
      low_rank: settings of the pairs.
      model: architecture of the base.
      base: name of the base in messages.

    Raises:
      CheckpointError: a tensor is missing, unexpected, of another shape, or not finite.
    """
    file, config_file, pairs = source.weights_file, source.config_file.name, _pairs(source)
    shapes = _module_shapes(model)
    beyond = [module for module in pairs if _layer(module) >= model.num_layers]
    if beyond:
        raise CheckpointError(
            f"{file}: holds {name_list(_tensors(pairs, beyond), 2)}, but {base} has the layers 0 "
            f"to {model.num_layers - 1}; give the base that the adapter was trained on"
        )
    unknown = [module for module in pairs if module not in shapes]
    if unknown:
        raise CheckpointError(
            f"{file}: holds {name_list(_tensors(pairs, unknown), 2)}, but {base} has no such "
            f"projection in its layers; give the base that the adapter was trained on"
        )
    leaves = (_A, _B, _MAGNITUDE) if low_rank.dora else (_A, _B)
    unused = [
        name
        for module, tensors in pairs.items()
        for leaf, name in tensors.items()
        if module not in adapted or leaf not in leaves
    ]
    if unused:
        raise CheckpointError(
            f"{file}: holds {name_list(unused, 2)}, which would be dropped, since {config_file} "
            f"does not state them (target_modules, exclude_modules, layers_to_transform, "
            f"use_dora); the two files are not of one adapter"
        )
    missing = [
        module for module in adapted if any(leaf not in pairs.get(module, {}) for leaf in leaves)
    ]
    if missing:
        last = max(map(_layer, pairs), default=-1)
        names = [f"base_model.model.{module}" for module in missing]
        if last >= 0 and min(map(_layer, missing)) > last:
            raise CheckpointError(
                f"{file}: has pairs on the layers up to {last}, but {config_file} adapts "
                f"{name_list(names, 2)} of {base} too; give the base that the adapter was trained "
                f"on, or the complete file"
            )
        raise CheckpointError(
            f"{file}: lacks the pairs of {name_list(names, 2)}, which {config_file} adapts on "
            f"{base}; get the complete file"
        )
    for module, size in adapted.items():
        fan_in, features = shapes[module]
        expected: dict[str, tuple[tuple[int, ...], int | None]] = {
            _A: ((size.rank, fan_in), 0),
            _B: ((features, size.rank), 1),
            _MAGNITUDE: ((features,), None),
        }
        for leaf in leaves:
            shape, rank_axis = expected[leaf]
            _require_shape(source, pairs[module][leaf], shape, rank_axis, base)
    return pairs


def leaves_from_pairs(
    source: AdapterFolder,
    pairs: Pairs,
    adapted: Mapping[str, PairSize],
    low_rank: LowRankConfig,
    specs: Mapping[str, LeafSpec],
    base: BaseModel,
) -> dict[str, np.ndarray]:
    """Leaves of the method, by path.

    Args:
      source: the adapter's folder.
      pairs: from `checked_pairs`.
      adapted: from `adapted_modules`.
      low_rank: rank and scale of all leaves; the rank is the largest one.
      specs: shapes of the leaves.
      base: the base; its weights are read if DoRA leaves modules out.
    """
    leaves = {path: np.zeros(spec.shape, spec.dtype) for path, spec in specs.items()}
    for kernel in kernels(base.config):
        site = "/".join(kernel.path[:-1])
        if f"{site}/{_A}" not in leaves:
            continue
        rows = slice(kernel.first_row, kernel.first_row + kernel.shape[-1])
        absent = []
        for layer, module in enumerate(modules_of(kernel)):
            if module not in adapted:
                absent.append(layer)
                continue
            size, names = adapted[module], pairs[module]
            tensors = {
                leaf: source.tensors[name].astype(np.float32) for leaf, name in names.items()
            }
            factor = _scale(size, low_rank.rslora) / low_rank.scale
            leaves[f"{site}/{_A}"][layer, :, : size.rank] = tensors[_A].T
            leaves[f"{site}/{_B}"][layer, : size.rank] = np.float32(factor) * tensors[_B][rows].T
            if low_rank.dora:
                leaves[f"{site}/magnitude"][layer] = tensors[_MAGNITUDE][rows]
        if low_rank.dora and absent:
            leaves[f"{site}/magnitude"][absent] = _base_norms(base, kernel, absent)
    return leaves


def _scale(size: PairSize, rslora: bool) -> float:
    """Factor of a pair's product, as `LowRankConfig.scale`."""
    return size.alpha / (size.rank**0.5 if rslora else size.rank)


def _pairs(source: AdapterFolder) -> Pairs:
    """The tensors of each module, after checking that there are no others."""
    file, pairs, others = source.weights_file, Pairs(), []
    adapters: set[str] = set()
    for name in source.tensors:
        match = _NAME.fullmatch(name)
        if match is None or match["kind"] == "bias" or match["module"] == "lm_head":
            others.append(name)
            continue
        # `model.` is absent where a decoder was adapted.
        module = MODEL + PREFIX.sub("", match["module"]).removeprefix(MODEL)
        tensors = pairs.setdefault(module, {})
        adapters.add(match["adapter"] or "")
        if len(adapters) > 1 or match["leaf"] in tensors:
            raise CheckpointError(
                f"{file}: holds several adapters, for example {tensors.get(match['leaf'], name)} "
                f"and {name}; save one of them with peft"
            )
        tensors[match["leaf"]] = name
    if others:
        raise CheckpointError(
            f"{file}: holds {name_list(sorted(others), 2)}, {_kind(min(others))}, which is "
            f"not supported; {MERGE}"
        )
    return pairs


def _kind(name: str) -> str:
    """Description of a tensor that is no part of a pair, for a message."""
    if name.endswith(".bias"):
        return "a trained bias"
    if "trainable_tokens" in name:
        return "trained rows of the embedding"
    if "lora_" in name or "base_layer" in name:
        return "of an adapted embedding or head"
    if name.endswith(".weight"):
        return "trained as a whole or saved with a resized vocabulary"
    return "no part of a LoRA"


def _module_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of all modules with kernels."""
    return {
        module: (kernel.shape[1], kernel.stored_rows)
        for kernel in kernels(model)
        for module in modules_of(kernel)
    }


def _layer(module: str) -> int:
    match = _LAYER.match(module)
    return int(match[1]) if match else -1


def _tensors(pairs: Pairs, modules: list[str]) -> list[str]:
    return [name for module in modules for name in pairs[module].values()]


def _require_shape(
    source: AdapterFolder, name: str, expected: tuple[int, ...], rank_axis: int | None, base: str
) -> None:
    shape, config_file = source.tensors[name].shape, source.config_file.name
    if shape != expected:
        remedy = "give the base that the adapter was trained on"
        if rank_axis is not None and shape[rank_axis : rank_axis + 1] != (expected[rank_axis],):
            remedy = f"{config_file} (r, rank_pattern) is not that of these weights"
        raise CheckpointError(
            f"{source.weights_file}: {name}: has shape {list(shape)}, but by {config_file} it "
            f"should have {list(expected)} on {base}; {remedy}"
        )
    require_finite(source, name)


def _base_norms(base: BaseModel, kernel: Leaf, layers: list[int]) -> np.ndarray:
    """Norms of a kernel's columns in some layers, [layers, out], at which DoRA changes nothing."""
    zeros_a, zeros_b = jnp.zeros((kernel.shape[1], 1)), jnp.zeros((1, kernel.shape[2]))
    with open_shards(base.folder) as shards:
        (leaf,) = (x for x in checked_leaves(shards, base.config) if x.path == kernel.path)
        return np.stack(
            [
                column_norms(
                    jnp.asarray(read_leaf(leaf, shards, np.dtype(np.float32), layer)),
                    zeros_a,
                    zeros_b,
                    1.0,
                )
                for layer in layers
            ]
        )
