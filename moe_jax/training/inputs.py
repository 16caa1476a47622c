"""What a run reads before the weights: base, data, and how long that makes the run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.checkpoints.fingerprint import BaseIdentity, base_fingerprint
from moe_jax.checkpoints.hf_config import model_config_from_hf, read_model_config
from moe_jax.checkpoints.resolve import resolve_checkpoint
from moe_jax.config.model import ModelConfig
from moe_jax.config.run import RunConfig
from moe_jax.data.pipeline import (
    TrainData,
    ValidationData,
    load_train_data,
    load_validation_data,
)
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import CheckpointError, ConfigError, DataError
from moe_jax.sharding.mesh import make_mesh


@dataclass(frozen=True)
class Inputs:
    """What a run reads, besides the weights."""

    base_folder: Path
    base: BaseIdentity
    model: ModelConfig
    train: dict[str, TrainData]
    validation: dict[str, dict[str, ValidationData]]
    total_steps: int


def read_inputs(config: RunConfig, say: Callable[[str], None]) -> Inputs:
    """Everything but the weights; what is quick to check comes first."""
    base_folder = resolve_checkpoint(config.base.path, config.base.revision)
    model = read_model_config(base_folder)
    _require_same_architecture(config, model, base_folder)
    base = BaseIdentity(config.base.path, base_fingerprint(base_folder))
    if all(adapter.data.num_workers == 0 for adapter in config.adapters.values()):
        # Not where processes are forked to tokenise: they would inherit locks of JAX's threads.
        make_mesh(config.mesh)

    tokenizer = load_tokenizer(base_folder)
    train_data, validation = {}, {}
    for name, adapter in config.adapters.items():
        # The same seed for all: an adapter's rows do not depend on what is trained beside it.
        train_data[name] = load_train_data(
            adapter.data, tokenizer, adapter.batch_size, config.training.seed
        )
        say(f"data of adapter {name!r}:")
        say(train_data[name].report)
        micro_rows = adapter.batch_size // config.training.micro_batches
        validation[name] = load_validation_data(adapter.data, tokenizer, micro_rows)
        for validation_data in validation[name].values():
            say(validation_data.report)
    total_steps = _total_steps(config, {n: data.num_rows for n, data in train_data.items()})
    return Inputs(base_folder, base, model, train_data, validation, total_steps)


def _total_steps(config: RunConfig, rows: Mapping[str, int]) -> int:
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None
    steps = {
        name: math.ceil(config.training.epochs * rows[name] / adapter.batch_size)
        for name, adapter in config.adapters.items()
    }
    if len(set(steps.values())) > 1:
        wanted = ", ".join(f"{count} for {name!r}" for name, count in steps.items())
        raise ConfigError(
            f"config.training.epochs: means another number of steps for each adapter ({wanted}); "
            "give config.training.steps instead"
        )
    return next(iter(steps.values()))


def _require_same_architecture(config: RunConfig, model: ModelConfig, folder: Path) -> None:
    """The fields that the configuration states for planning must be the checkpoint's."""
    if config.base.hf_config is None:
        return
    stated = model_config_from_hf(config.base.hf_config, "config.base.hf_config")
    for name, value in vars(model).items():
        if getattr(stated, name) != value:
            raise ConfigError(
                f"config.base.hf_config: says {name} {getattr(stated, name)!r}, but {folder} has "
                f"{value!r}; correct it, or leave hf_config out"
            )


def require_same_inputs(
    folder: Path, metadata: Mapping[str, Any], inputs: Inputs, step: int
) -> None:
    """Refuses to resume with another base or other data than the run began with."""
    base = BaseIdentity(**metadata["base"])
    if base.fingerprint != inputs.base.fingerprint:
        raise CheckpointError(
            f"{folder}: was trained on the base {base.path}, and the weights in "
            f"{inputs.base_folder} differ from it; give that base, or another --workdir"
        )
    for name, data in inputs.train.items():
        if metadata["data"].get(name) != data.fingerprint:
            raise DataError(
                f"{folder}: the training data of adapter {name!r} changed since the run "
                "began; restore the files, or give another --workdir"
            )
    if inputs.total_steps < step:
        raise ConfigError(
            f"config.training.steps: {inputs.total_steps} steps, but {folder} is at step "
            f"{step}; ask for more, or give another --workdir"
        )
