"""The model, parameters and adapters for inference, evaluation and inspection."""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh

from moe_jax.adapters.method import AdapterMethod
from moe_jax.checkpoints.adapter_files import SavedAdapter, load_adapter
from moe_jax.checkpoints.leaves import checksums
from moe_jax.config.model import ComputeConfig, FloatType
from moe_jax.config.parse import located, to_plain
from moe_jax.hf.base_model import BaseModel
from moe_jax.hf.load import load_base_params
from moe_jax.loaded.run_adapters import resolve_adapter
from moe_jax.models.adapted import abstract_params, untrained_adapter
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.processes.agreement import require_one_process
from moe_jax.sharding.placement import place
from moe_jax.sharding.rules import shardings_of

BASE = "base"
"""Name of the base model without an adapter in prompts and results."""


class Adapter(NamedTuple):
    """Method and weights of an adapter."""

    method: AdapterMethod
    tree: Any


class NamedAdapter(NamedTuple):
    """A loaded adapter with its name and origin.

    Attributes:
      name: the user's name for it.
      origin: folder or hub id; None if it was given in memory.
      digest: hash of its method and weights.
      saved: the adapter as it was loaded.
    """

    name: str
    origin: str | None
    digest: str
    saved: SavedAdapter

    @property
    def adapter(self) -> Adapter:
        """Method and weights."""
        return Adapter(self.saved.method, self.saved.tree)


def build_model(base: BaseModel, dtype: FloatType) -> LlamaForCausalLM:
    """Model of a base, with parameters and computation in `dtype`.

    Raises:
      ConfigError: this process is one of several.
    """
    require_one_process()
    return LlamaForCausalLM(base.config, ComputeConfig(dtype=dtype), param_dtype=dtype)


def load_params(base: BaseModel, model: LlamaForCausalLM, mesh: Mesh | None) -> Any:
    """Loads the parameters in the type of `model`, onto the mesh or one device.

    Raises:
      CheckpointError: a file or tensor is missing or damaged, or an adapter has another base.
      DeviceError: the mesh does not divide a parameter evenly.
    """
    shardings = None
    if mesh is not None:
        shardings = shardings_of(abstract_params(model), mesh)
    if base.params is None:
        params = load_base_params(base.folder, base.config, model.param_dtype, shardings)
    else:
        params = base.params if shardings is None else jax.device_put(base.params, shardings)
    base.require_expected()
    return params


def load_adapters(
    adapters: Mapping[str, str | Path | SavedAdapter],
    base: BaseModel,
    model: LlamaForCausalLM,
    mesh: Mesh | None,
) -> list[NamedAdapter]:
    """Loads adapters from their folders or from memory, onto the mesh or one device.

    Raises:
      CheckpointError: a folder holds no adapter or is damaged, or an adapter has another base. If
        all of its weights must be read to see that, `load_params` raises it.
    """
    loaded = []
    for name, adapter in adapters.items():
        is_saved = isinstance(adapter, SavedAdapter)
        saved = adapter if is_saved else load_adapter(resolve_adapter(adapter))
        base.require_trained_on(f"adapter {name!r}", saved.base, "give that base", later=True)
        with located(f"adapter {name!r}"):
            saved.method.check_model(base.config)
        parts = [to_plain(saved.method), checksums(saved.tree)]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        if mesh is not None:
            boxed = jax.eval_shape(
                functools.partial(untrained_adapter, model, saved.method),
                nn.meta.unbox(abstract_params(model)),
                jax.random.key(0),
            )
            saved = saved._replace(tree=place(saved.tree, shardings_of(boxed, mesh)))
        loaded.append(NamedAdapter(name, None if is_saved else str(adapter), digest, saved))
    return loaded
