"""Base and adapters from their folders to a service that is ready to start."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from moe_jax.adapters.method import require_language_model
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.model import ComputeConfig, FloatType
from moe_jax.config.parse import require
from moe_jax.config.run import MeshConfig
from moe_jax.data.new_tokens import load_extended_tokenizer
from moe_jax.errors import ConfigError
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.inference.limits import context_of, frequency_switch
from moe_jax.inference.stopping import end_tokens
from moe_jax.loaded.inference_model import Adapter, build_model, load_adapters, load_params
from moe_jax.serving.engine import Engine
from moe_jax.serving.limits import EngineLimits
from moe_jax.serving.metrics import Metrics
from moe_jax.serving.service import Service
from moe_jax.serving.serving_model import ServingModel
from moe_jax.sharding.mesh import make_mesh

DEFAULT_LENGTH = 2048
"""Default of `EngineLimits.max_length`, where the base's context is longer."""

_CACHE_PER_ROW = 512


@dataclass(frozen=True)
class OpenModels:
    """A base without its weights yet, its adapters and its tokenizer.

    Attributes:
      name: name of the base in requests.
      base: the base.
      adapters: adapters by name.
      tokenizer: tokenizer of the base, with new tokens of the adapters.
      dtype: dtype of weights and computation.
      mesh: None is one device.
    """

    name: str
    base: BaseModel
    adapters: Mapping[str, Adapter]
    tokenizer: PreTrainedTokenizerBase
    dtype: FloatType
    mesh: Mesh | None

    @property
    def longest(self) -> int:
        """Largest number of tokens of a row.

        Longrope changes the frequencies of all rows of a batch when one of them passes a length,
        which would invalidate the cache of the others.
        """
        switch = frequency_switch(self.base.config)
        context = self.base.config.max_position_embeddings
        return context if switch is None else min(context, switch)

    def limits(
        self,
        *,
        max_rows: int = 16,
        max_length: int | None = None,
        max_queue: int = 256,
        cache_tokens: int | None = None,
    ) -> EngineLimits:
        """Sizes of the engine, with the defaults for this base.

        Raises:
          ConfigError: a size is out of range.
        """
        if max_length is not None:
            context_of(self.base.config, max_length)
        length = min(max_length or DEFAULT_LENGTH, self.longest)
        require(
            max_length is None or max_length <= length,
            "max_length",
            f"must be at most {length}, where this model's longrope changes all frequencies, got "
            f"{max_length}",
        )
        tokens = max(length, _CACHE_PER_ROW * max_rows) if cache_tokens is None else cache_tokens
        limits = EngineLimits(max_rows, length, max_queue, tokens)
        limits.check()
        return limits

    def notes(self, limits: EngineLimits) -> list[str]:
        """Lines of the log about the base and the sizes."""
        config = self.base.config
        width = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        mebibytes = limits.cache_tokens * width * np.dtype(self.dtype).itemsize / 2**20
        cache = (
            f"cache: {limits.cache_tokens} tokens in blocks of {limits.block} ({mebibytes:.0f} "
            f"MiB), at most {limits.max_length} of each of {limits.max_rows} rows"
        )
        return [cache] if self.base.unread_note is None else [self.base.unread_note, cache]


def open_models(
    base: str | Path | BaseModel,
    adapters: Mapping[str, str | Path | SavedAdapter],
    *,
    revision: str | None = None,
    dtype: FloatType = "float32",
    mesh: MeshConfig | None = None,
) -> OpenModels:
    """Opens a base and adapters, and reads all but the weights of the base.

    Args:
      base: folder, hub id, or base in memory.
      adapters: folders or hub ids by name, or adapters in memory.
      revision: revision of a hub id.
      dtype: dtype of weights and computation.
      mesh: None is one device.

    Raises:
      CheckpointError: one is missing or damaged, or an adapter belongs to another base.
      ConfigError: the base has layers of several kinds, an adapter is a classifier or has the
        base's name, or their new tokens differ.
      DeviceError: there are too few devices for the mesh.
    """
    files = open_base(base, revision)
    if not files.config.has_equal_layers:
        raise ConfigError(
            f"--base {files.path}: its layers are of several kinds, which the server does not "
            "compute; use moe-jax generate"
        )
    devices = None if mesh is None else make_mesh(mesh)
    loaded = load_adapters(adapters, files, build_model(files, dtype), devices)
    for named in loaded:
        require_language_model(named.saved.method, named.name, "generate text")
    name = Path(os.path.abspath(str(files.path))).name
    if name in adapters:
        raise ConfigError(f"--adapter: {name!r} is the base's name; give another with NAME=DIR")
    methods = [named.saved.method for named in loaded]
    tokenizer = load_extended_tokenizer(files.folder, files.config, methods, visible=True)
    return OpenModels(
        name, files, {one.name: one.adapter for one in loaded}, tokenizer, dtype, devices
    )


def load_service(models: OpenModels, limits: EngineLimits) -> Service:
    """Reads the weights of the base and allocates the cache; the engine is not started yet.

    Raises:
      CheckpointError: a file or tensor of the base is missing or damaged.
      DeviceError: the mesh does not divide a parameter evenly.
    """
    config = models.base.config
    params: Any = load_params(models.base, build_model(models.base, models.dtype), models.mesh)
    serving_model = ServingModel(
        config,
        params,
        {name: (adapter.method, adapter.tree) for name, adapter in models.adapters.items()},
        compute=ComputeConfig(dtype=models.dtype),
        mesh=models.mesh,
    )
    metrics = Metrics()
    return Service(
        models.name,
        config,
        {name: adapter.method for name, adapter in models.adapters.items()},
        models.tokenizer,
        end_tokens(models.base.folder, models.tokenizer),
        Engine(serving_model, limits, metrics),
        metrics,
    )
