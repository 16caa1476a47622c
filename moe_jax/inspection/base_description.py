"""Description of a base checkpoint, and of an adapter of it, without loading weights."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.tree import (
    ALL_MODULES,
    ATTENTION_MODULES,
    DELTA_NET_MODULES,
    LAYER_EMBEDDING_MODULES,
    MLP_MODULES,
)
from moe_jax.checkpoints.leaves import LeafSpec, module_of, parameters_by_module
from moe_jax.config.attention import LINEAR_ATTENTION, WIDE_FFN
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import located
from moe_jax.config.rope import RopeConfig
from moe_jax.hf.base_model import open_base
from moe_jax.hf.families.family import family_of
from moe_jax.hf.key_table import module_counts
from moe_jax.hf.load import checked_leaves
from moe_jax.hf.shards import name_list, open_shards
from moe_jax.loaded.adapter_base import expected_leaves

_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclasses.dataclass(frozen=True)
class AdapterDescription:
    """Parameters of an adapter of a base.

    Attributes:
      name: name of the adapter.
      method: name of the adapter method.
      leaves: shape and dtype of each parameter array, by path.
    """

    name: str
    method: str
    leaves: dict[str, LeafSpec]

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(math.prod(spec.shape) for spec in self.leaves.values())

    @property
    def modules(self) -> dict[str, int]:
        """Number of trainable parameters over all layers, by module."""
        return leaf_modules(self.leaves)

    @property
    def targets(self) -> list[str]:
        """Projections of the base that are adapted or have experts."""
        return [
            name
            for name in ALL_MODULES
            if any(name in module.split("/") for module in self.modules)
        ]


@dataclasses.dataclass(frozen=True)
class BaseDescription:
    """Architecture, size and identity of a checkpoint.

    Attributes:
      path: folder or hub id, as given.
      folder: local folder.
      config: architecture.
      architecture: name of the architecture in transformers.
      modules: number of parameters over all layers, by module.
      stored: number of bytes of the tensors, by dtype on disk.
      files: number of bytes of each weight file.
      fingerprint: fingerprint of the weights, which adapters store.
      unread: see `BaseModel.unread`.
    """

    path: str
    folder: Path
    config: ModelConfig
    architecture: str
    modules: dict[str, int]
    stored: dict[str, int]
    files: dict[str, int]
    fingerprint: str
    unread: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters; a tied head is counted once."""
        return sum(self.modules.values())

    def adapter(self, name: str, method: AdapterMethod) -> AdapterDescription:
        """Description of an adapter of `method`, from shapes only.

        Raises:
          ConfigError: the base does not support the method.
        """
        with located(f"adapter {name!r}"):
            method.check_model(self.config)
        return AdapterDescription(
            name, METHODS.name_of(method), expected_leaves(self.config, method)
        )

    def lines(self) -> list[str]:
        """Lines of text for `moe-jax inspect`."""
        config = self.config
        files = ", ".join(list(self.files)[:2]) + (", ..." if len(self.files) > 2 else "")
        stored = ", ".join(
            f"{_TYPES.get(dtype, dtype)} {readable_size(size)}"
            for dtype, size in self.stored.items()
        )
        count = len(self.files)
        table = [
            ("base", self.path),
            ("", f"fingerprint {self.fingerprint[:16]}"),
            ("family", f"{config.model_type} ({self.architecture})"),
            ("layers", f"{config.num_layers}, width {config.hidden_size}"),
            ("ffn", f"width {config.intermediate_size}, {config.hidden_act}{_wide_ffn(config)}"),
            ("heads", _heads(config)),
            *_global_attention(config),
            *_delta_net(config),
            *_readers(config),
            *_layer_embeddings(config),
            ("vocabulary", f"{config.vocab_size:,}, {_head(config)}"),
            (
                "positions",
                f"{config.max_position_embeddings:,}, {_rope(config.rope)}{_unrotated(config)}",
            ),
            *_window(config),
            ("stored", f"{stored} in {count} file{'s' if count > 1 else ''} ({files})"),
            ("parameters", f"{self.parameters:,}"),
        ]
        if self.unread:
            modules = name_list(module_counts(self.unread))
            table.append(("not read", f"{modules}, as no part of the model"))
        return [*_columns(table), *module_lines(self.modules)]


def describe_base(base: str | Path, revision: str | None = None) -> BaseDescription:
    """Describes a checkpoint from `config.json` and the headers of its weight files.

    The checks are those of loading the weights. A few rows of each tensor are read for the
    fingerprint.

    Args:
      base: folder in the Hugging Face format, or hub id.
      revision: revision of a hub id.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or its architecture is not supported.
    """
    opened = open_base(base, revision)
    folder, config = opened.folder, opened.config
    modules: collections.Counter[str] = collections.Counter()
    stored: collections.Counter[str] = collections.Counter()
    with open_shards(folder) as shards:
        for leaf in checked_leaves(shards, config):
            # A leaf of the layer itself, as in Gemma 4, has no module.
            modules[module_of("/".join(leaf.path)) or leaf.path[-1]] += math.prod(leaf.shape)
        for tensor in shards.tensors.values():
            stored[tensor.dtype] += math.prod(tensor.shape) * _SIZES.get(tensor.dtype, 0)
        files = sorted({tensor.file for tensor in shards.tensors.values()})
    return BaseDescription(
        path=str(base),
        folder=folder,
        config=config,
        architecture=family_of(config).architecture,
        modules=dict(modules),
        stored=dict(stored),
        files={name: (folder / name).stat().st_size for name in files},
        fingerprint=opened.identity.fingerprint,
        unread=opened.unread,
    )


def adapter_lines(adapter: AdapterDescription, base: BaseDescription) -> list[str]:
    """Lines of text on an adapter, for `moe-jax inspect`."""
    share = adapter.parameters / base.parameters
    size = f"{adapter.parameters:,} parameters ({share:.3%} of the base)"
    matched = f"on {', '.join(adapter.targets)} of {base.config.num_layers} layers"
    return [
        *_columns(
            [("adapter", f"{adapter.name}: {adapter.method}, {matched}"), ("trainable", size)]
        ),
        *module_lines(adapter.modules),
    ]


def leaf_modules(leaves: Mapping[str, LeafSpec]) -> dict[str, int]:
    """Number of parameters of an adapter over all layers, by module."""
    counts = parameters_by_module(leaves)
    return {module: counts[module] for module in sorted(counts, key=_sort_key)}


def module_lines(modules: Mapping[str, int]) -> list[str]:
    """Lines with the number of parameters and the share of each module."""
    total, width = sum(modules.values()), max(map(len, modules))
    digits = max(len(f"{count:,}") for count in modules.values())
    return [
        f"  {module:{width}}  {count:>{digits},}  {count / total:6.1%}"
        for module, count in modules.items()
    ]


def readable_size(size: int) -> str:
    """Size in powers of 1000, as on model hubs."""
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if size >= 1000**power:
            return f"{size / 1000**power:.2f} {unit}"
    return f"{size} B"


def _sort_key(module: str) -> tuple[float, str]:
    """Sorts attention before the FFN, and the router of an FFN before its experts."""
    attention = (*ATTENTION_MODULES, *DELTA_NET_MODULES)
    for index, name in enumerate((*attention, *MLP_MODULES, *LAYER_EMBEDDING_MODULES)):
        if name in module.split("/"):
            return index, module
    return len(attention) - 0.5, module


def _heads(config: ModelConfig) -> str:
    text = f"{config.num_heads} of {config.head_dim} channels"
    if config.num_kv_heads == config.num_heads:
        return text
    shared = config.num_heads // config.num_kv_heads
    return f"{text}; {config.num_kv_heads} key-value heads, each for {shared} query heads"


def _global_attention(config: ModelConfig) -> list[tuple[str, str]]:
    if config.global_attention is None:
        return []
    number = config.num_layers - sum(config.sliding_layers)
    layers = f"in {number} of {config.num_layers} layers"
    values = "; values are keys" if config.global_attention.key_as_value else ""
    return [("global", f"{layers}: {_heads(config.global_layers)}{values}")]


def _delta_net(config: ModelConfig) -> list[tuple[str, str]]:
    net = config.delta_net
    if net is None:
        return []
    layers = f"in {len(config.layers_with(LINEAR_ATTENTION))} of {config.num_layers} layers"
    keys = f"{net.num_key_heads} key heads of {net.key_head_dim} channels"
    values = f"{net.num_value_heads} value heads of {net.value_head_dim}"
    return [("delta net", f"{layers}: {keys}, {values}, filters of {net.filter_width}")]


def _wide_ffn(config: ModelConfig) -> str:
    layers = len(config.layers_with(WIDE_FFN))
    return f"; {config.reader_ffn_width} in {layers} of {config.num_layers}" if layers else ""


def _readers(config: ModelConfig) -> list[tuple[str, str]]:
    number = config.num_reader_layers
    text = f"the last {number} of {config.num_layers} layers have those of earlier layers"
    return [("key-values", text)] if number else []


def _layer_embeddings(config: ModelConfig) -> list[tuple[str, str]]:
    width = config.layer_embedding_width
    return [] if width is None else [("embeddings", f"of width {width} for each layer too")]


def _head(config: ModelConfig) -> str:
    return "tied head" if config.tie_word_embeddings else "untied head"


def _rope(rope: RopeConfig) -> str:
    specified: dict[str, Any] = {
        field.name: getattr(rope, field.name)
        for field in dataclasses.fields(rope)
        if getattr(rope, field.name) != field.default
    }
    kind, theta = specified.pop("rope_type"), specified.pop("rope_theta")
    others = [
        f"{name} {value}"
        for name, value in specified.items()
        if not isinstance(value, list | tuple)
    ]
    return ", ".join([f"rope {kind}", f"theta {theta:g}", *others])


def _unrotated(config: ModelConfig) -> str:
    rotated = config.rotated_layers
    return "" if rotated is None else f"; none in {rotated.count(False)} of {len(rotated)} layers"


def _window(config: ModelConfig) -> list[tuple[str, str]]:
    if config.sliding_window is None:
        return []
    sliding = sum(config.sliding_layers)
    text = f"{config.sliding_window:,} positions in {sliding} of {config.num_layers} layers"
    local = config.sliding_rope
    return [("window", text if local is None else f"{text}, {_rope(local)}")]


def _columns(table: list[tuple[str, str]]) -> list[str]:
    return [f"{label:10} {text}" for label, text in table]
