"""The whole configuration of a training run, parsed once from a `configs/*.py` file."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_jax.config.data import DataConfig
from moe_jax.config.model import ComputeConfig, FloatType
from moe_jax.config.optimizer import OptimizerConfig
from moe_jax.config.parse import ROOT, parse, parse_member, require
from moe_jax.config.registry import Registry, to_plain


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The frozen base model.

    Attributes:
      path: a folder with a Hugging Face checkpoint, or a hub id.
      param_dtype: the type in which the frozen parameters are kept on the device.
      revision: the hub revision.
      hf_config: the fields of the checkpoint's `config.json`, where they are to be known without
        the checkpoint (`train.py --plan`). A run compares them with the checkpoint's own.
    """

    path: str
    param_dtype: FloatType
    revision: str | None = None
    hf_config: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices along each axis of the mesh; -1 takes all that the others leave.

    Attributes:
      data: copies of the model, each with its own rows of a batch.
      fsdp: devices that share one copy of the parameters and also split the rows.
      tensor: devices that split each matrix product.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            require(size == -1 or size > 0, name, "must be positive, or -1 for the rest")
        require(list(sizes.values()).count(-1) <= 1, "data", "only one axis may be -1")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """One adapter: what it is, what it learns from, and how.

    Attributes:
      method: the method's own configuration (for example `LoraConfig`), chosen by `method.name`.
      data: its data sets.
      optimizer: its optimiser and schedule.
      batch_size: its rows in one optimiser step, over all devices and micro-batches.
    """

    method: Any
    data: DataConfig
    optimizer: OptimizerConfig
    batch_size: int

    def __post_init__(self):
        require(self.batch_size > 0, "batch_size", "must be positive")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length and bookkeeping of the run.

    Attributes:
      steps: optimiser steps; exclusive with `epochs`.
      epochs: passes over the training rows.
      micro_batches: parts into which a batch is cut; their gradients are summed before the one
        optimiser step.
      seed: of initialisation, dropout, jitter and data order.
      log_every: steps between two lines of metrics.
      eval_every: steps between two measurements of the validation losses; 0 measures at the end.
      max_skipped_steps: consecutive steps with a gradient that is not finite before the run stops.
      initial_loss_scale: of the dynamic loss scaling; read with compute.dtype 'float16' only.
    """

    steps: int | None = None
    epochs: float | None = None
    micro_batches: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    max_skipped_steps: int = 10
    initial_loss_scale: float = 65536.0

    def __post_init__(self):
        require(
            (self.steps is None) != (self.epochs is None),
            "steps",
            "give either steps or epochs, and None for the other (--config.training.epochs=None)",
        )
        require(self.steps is None or self.steps > 0, "steps", "must be positive")
        require(self.epochs is None or self.epochs > 0, "epochs", "must be positive")
        for name in ("micro_batches", "log_every", "max_skipped_steps"):
            require(getattr(self, name) > 0, name, "must be positive")
        require(self.eval_every >= 0, "eval_every", "must not be negative")
        require(self.seed >= 0, "seed", "must not be negative")
        require(self.initial_loss_scale >= 1.0, "initial_loss_scale", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When and how many training states are kept.

    Attributes:
      every: steps between two saves; the last step is always saved.
      keep: how many are kept, the newest ones.
    """

    every: int = 200
    keep: int = 2

    def __post_init__(self):
        require(self.every > 0, "every", "must be positive")
        require(self.keep > 0, "keep", "must be positive")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Where metrics go besides the console and `metrics.jsonl`."""

    tensorboard: bool = False
    wandb_project: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything `train.py` needs to know."""

    base: BaseConfig
    compute: ComputeConfig
    adapters: dict[str, AdapterConfig]
    training: TrainingConfig
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self):
        require(bool(self.adapters), "adapters", "names no adapter")
        for name, adapter in self.adapters.items():
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is not None,
                f"adapters.{name}",
                "an adapter's name holds letters, digits, '_' and '-' only",
            )
            require(
                adapter.batch_size % self.training.micro_batches == 0,
                f"adapters.{name}.batch_size",
                f"{adapter.batch_size} rows cannot be cut into "
                f"training.micro_batches={self.training.micro_batches} equal parts",
            )


def parse_run_config(raw: Mapping[str, Any], methods: Registry) -> RunConfig:
    """Builds a `RunConfig` from what a config file's `get_config()` returned.

    Args:
      raw: nested mappings; an `ml_collections.ConfigDict` is given as `.to_dict()`.
      methods: the adapter methods (`adapters.METHODS`).

    Raises:
      ConfigError: with the path of the offending field.
    """
    raw = {**raw}
    adapters = raw.get("adapters")
    if isinstance(adapters, Mapping):
        raw["adapters"] = {
            name: _with_parsed_method(adapter, methods, f"{ROOT}.adapters.{name}")
            for name, adapter in adapters.items()
        }
    return parse(RunConfig, raw)


def _with_parsed_method(adapter: Any, methods: Registry, path: str) -> Any:
    if not isinstance(adapter, Mapping) or "method" not in adapter:
        return adapter  # `parse` says what is wrong with it
    return {**adapter, "method": parse_member(methods, adapter["method"], f"{path}.method")}


def to_json(config: RunConfig) -> str:
    """`config` as JSON that `parse_run_config` reads back to an equal `RunConfig`."""
    return json.dumps(to_plain(config), indent=2)
