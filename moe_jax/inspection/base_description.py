"""What a base checkpoint is, and what an adapter on it would be; no weight is loaded."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.checkpoints.leaves import LeafSpec
from moe_jax.config.model import ModelConfig, RopeConfig
from moe_jax.config.parse import located
from moe_jax.hf.base_model import open_base
from moe_jax.hf.families.family import family_of
from moe_jax.hf.load import checked_leaves
from moe_jax.hf.shards import open_shards
from moe_jax.loaded.adapter_base import expected_leaves

_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class AdapterFit:
    """What an adapter of a method is on a base.

    Attributes:
      name: of the adapter.
      method: of the adapter, by name.
      leaves: shape and type of each of its weights, by path.
    """

    name: str
    method: str
    leaves: dict[str, LeafSpec]

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        return sum(math.prod(spec.shape) for spec in self.leaves.values())

    @property
    def modules(self) -> dict[str, int]:
        """Trainable numbers of all layers by the module that holds them."""
        return leaf_modules(self.leaves)

    @property
    def targets(self) -> list[str]:
        """The base's modules that are adapted, or whose experts these are."""
        found = {name for name in TARGET_MODULES for module in self.modules if name in module}
        return [name for name in TARGET_MODULES if name in found]


@dataclasses.dataclass(frozen=True)
class BaseDescription:
    """What a checkpoint is.

    Attributes:
      path: as it was given.
      folder: where it lies.
      config: its architecture.
      architecture: transformers' name of it.
      modules: parameters of all layers by module.
      stored: bytes of the tensors by their type on disk.
      files: bytes of each file of weights.
      fingerprint: what adapters remember it by.
    """

    path: str
    folder: Path
    config: ModelConfig
    architecture: str
    modules: dict[str, int]
    stored: dict[str, int]
    files: dict[str, int]
    fingerprint: str

    @property
    def parameters(self) -> int:
        """Numbers in all weights; a head that is the embedding counts once."""
        return sum(self.modules.values())

    def fit(self, name: str, method: AdapterMethod) -> AdapterFit:
        """What an adapter of `method` on this base is; traced with shapes, not computed.

        Raises:
          ConfigError: the method does not go with this base.
        """
        with located(f"adapter {name!r}"):
            method.check_model(self.config)
        return AdapterFit(name, METHODS.name_of(method), expected_leaves(self.config, method))

    def lines(self) -> list[str]:
        """For people."""
        config = self.config
        files = ", ".join(list(self.files)[:2]) + (", ..." if len(self.files) > 2 else "")
        stored = ", ".join(
            f"{_TYPES.get(dtype, dtype)} {readable(size)}" for dtype, size in self.stored.items()
        )
        count = len(self.files)
        table = [
            ("base", self.path),
            ("", f"fingerprint {self.fingerprint[:16]}"),
            ("family", f"{config.model_type} ({self.architecture})"),
            ("layers", f"{config.num_layers}, width {config.hidden_size}"),
            ("ffn", f"width {config.intermediate_size}, {config.hidden_act}"),
            ("heads", _heads(config)),
            ("vocabulary", f"{config.vocab_size:,}, {_head(config)}"),
            ("positions", f"{config.max_position_embeddings:,}, {_rope(config.rope)}"),
            *_window(config),
            ("stored", f"{stored} in {count} file{'s' if count > 1 else ''} ({files})"),
            ("parameters", f"{self.parameters:,}"),
        ]
        return [*_columns(table), *module_lines(self.modules)]


def describe_base(base: str | Path, revision: str | None = None) -> BaseDescription:
    """Reads what a checkpoint is from `config.json` and the headers of its weights.

    Everything is checked as if the weights were to be loaded; a few rows of each are read for the
    fingerprint.

    Args:
      base: a folder in the Hugging Face format, or a hub id.
      revision: of a hub id.

    Raises:
      CheckpointError: the checkpoint is missing, damaged, or not of a known architecture.
    """
    opened = open_base(base, revision)
    folder, config = opened.folder, opened.config
    modules: collections.Counter[str] = collections.Counter()
    stored: collections.Counter[str] = collections.Counter()
    with open_shards(folder) as shards:
        for leaf in checked_leaves(shards, config):
            modules[_module("/".join(leaf.path))] += math.prod(leaf.shape)
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
    )


def fit_lines(fit: AdapterFit, base: BaseDescription) -> list[str]:
    """What an adapter on a base is, for people."""
    share = fit.parameters / base.parameters
    size = f"{fit.parameters:,} parameters ({share:.3%} of the base)"
    matched = f"on {', '.join(fit.targets)} of {base.config.num_layers} layers"
    return [
        *_columns([("adapter", f"{fit.name}: {fit.method}, {matched}"), ("trainable", size)]),
        *module_lines(fit.modules),
    ]


def leaf_modules(leaves: Mapping[str, LeafSpec]) -> dict[str, int]:
    """The numbers in an adapter's leaves, of all layers, by the module that holds them."""
    counts: collections.Counter[str] = collections.Counter()
    for path, spec in leaves.items():
        counts[_module(path)] += math.prod(spec.shape)
    return dict(sorted(counts.items(), key=lambda item: _place(item[0])))


def module_lines(modules: Mapping[str, int]) -> list[str]:
    """Modules with their numbers of parameters and shares, in columns."""
    total, width = sum(modules.values()), max(map(len, modules))
    digits = max(len(f"{count:,}") for count in modules.values())
    return [
        f"  {module:{width}}  {count:>{digits},}  {count / total:6.1%}"
        for module, count in modules.items()
    ]


def readable(size: int) -> str:
    """Bytes for people, in powers of 1000, as hubs give the sizes of files."""
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if size >= 1000**power:
            return f"{size / 1000**power:.2f} {unit}"
    return f"{size} B"


def _place(module: str) -> tuple[float, str]:
    """Attention before the FFN, as tokens pass; a router of a whole FFN in front of its experts."""
    for place, name in enumerate(TARGET_MODULES):
        if name in module.split("/"):
            return place, module
    return TARGET_MODULES.index("gate_proj") - 0.5, module


def _module(path: str) -> str:
    """The path of the module of a leaf, without what says that layers are stacked."""
    return "/".join(part for part in path.split("/")[:-1] if part != "layers")


def _heads(config: ModelConfig) -> str:
    text = f"{config.num_heads} of {config.head_dim} channels"
    if config.num_kv_heads == config.num_heads:
        return text
    shared = config.num_heads // config.num_kv_heads
    return f"{text}; {config.num_kv_heads} of keys and values, each for {shared} queries"


def _head(config: ModelConfig) -> str:
    tied = "is the embedding" if config.tie_word_embeddings else "has weights of its own"
    return f"the head {tied}"


def _rope(rope: RopeConfig) -> str:
    stated: dict[str, Any] = {
        field.name: getattr(rope, field.name)
        for field in dataclasses.fields(rope)
        if getattr(rope, field.name) != field.default
    }
    kind, theta = stated.pop("rope_type"), stated.pop("rope_theta")
    others = [
        f"{name} {value}" for name, value in stated.items() if not isinstance(value, list | tuple)
    ]
    return ", ".join([f"rope {kind}", f"theta {theta:g}", *others])


def _window(config: ModelConfig) -> list[tuple[str, str]]:
    if config.sliding_window is None:
        return []
    sliding = sum(config.sliding_layers)
    text = f"{config.sliding_window:,} positions in {sliding} of {config.num_layers} layers"
    local = config.sliding_rope
    return [("window", text if local is None else f"{text}, {_rope(local)}")]


def _columns(table: list[tuple[str, str]]) -> list[str]:
    return [f"{label:10} {text}" for label, text in table]
