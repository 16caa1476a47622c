"""What a run reads before the weights: base, data, and how long that makes the run."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from transformers import PreTrainedTokenizerBase

from moe_jax.config.model import ModelConfig
from moe_jax.config.run import RunConfig
from moe_jax.data.pipeline import (
    ORDER,
    TrainData,
    ValidationData,
    load_train_data,
    load_validation_data,
)
from moe_jax.data.tokenised_source import TokenisedSource
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import CheckpointError, ConfigError, DataError, named
from moe_jax.hf.config import model_config_from_hf, read_model_config
from moe_jax.hf.fingerprint import BaseIdentity, base_fingerprint
from moe_jax.hf.resolve import resolve_checkpoint
from moe_jax.sharding.mesh import make_mesh
from moe_jax.tasks.selection import named_task
from moe_jax.tasks.training_rows import read_source_or_task, source_task
from moe_jax.training.run.checks import require_divisible_rows, require_fitting_methods
from moe_jax.training.run.warm_start import require_starts


@dataclass(frozen=True)
class Inputs:
    """What a run reads, besides the weights.

    Attributes:
      base_folder: where the base's checkpoint lies.
      base: what adapters remember the base by.
      model: its architecture.
      train: the training data of each adapter.
      validation: the validation sets of each adapter, by name.
      steps: how many optimiser steps each adapter makes.
    """

    base_folder: Path
    base: BaseIdentity
    model: ModelConfig
    train: dict[str, TrainData]
    validation: dict[str, dict[str, ValidationData]]
    steps: dict[str, int]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return max(self.steps.values())

    def data_fingerprint(self, adapter: str) -> dict[str, str]:
        """Digests of all that `adapter` learns from and is measured on, by part."""
        sets = self.validation[adapter].items()
        measured = {f"validation/{name}": validation.digest for name, validation in sets}
        return {**self.train[adapter].fingerprint, **measured}


def read_inputs(config: RunConfig, say: Callable[[str], None], *, resumes: bool = False) -> Inputs:
    """Everything but the weights; what is quick to check comes first.

    Args:
      config: the whole configuration.
      say: takes the lines for people.
      resumes: the run goes on from a state of its own, and `start_from` is not read again.
    """
    _require_no_fork_beside_jax(config)
    _require_tasks(config)
    with named("config.base.path"):
        base_folder = resolve_checkpoint(config.base.path, config.base.revision)
    model = read_model_config(base_folder)
    require_stated_architecture(config, model, base_folder)
    require_fitting_methods(config, model)
    lengths = {name: config.length_group(name)[1].steps for name in config.adapters}
    _require_warmup_to_end(config, {name: n for name, n in lengths.items() if n is not None})
    unpacked = {
        name: adapter.data.max_length
        for name, adapter in config.adapters.items()
        if not adapter.data.is_packed
    }
    _warn_of_positions(unpacked, model, say)
    base = BaseIdentity(config.base.path, base_fingerprint(base_folder))
    if not resumes:
        require_starts(config, base)
    if all(adapter.data.num_workers == 0 for adapter in config.adapters.values()):
        # Not where processes are forked to tokenise: they would inherit locks of JAX's threads.
        require_divisible_rows(config, make_mesh(config.mesh))

    tokenizer = load_tokenizer(base_folder)
    train_data, validation = {}, {}
    tokenised: dict[str, TokenisedSource] = {}
    reports: dict[str, list[str]] = {}
    for name, adapter in config.adapters.items():
        field, classification = f"config.adapters.{name}.data", adapter.method.classification
        read = functools.partial(
            read_source_or_task,
            folder=config.tasks_folder,
            classified=classification is not None,
        )
        train_data[name] = load_train_data(
            adapter.data,
            tokenizer,
            adapter.batch_size,
            config.seed(name),
            field,
            place_seed=config.training.seed,
            known=tokenised,
            read=read,
            classification=classification,
        )
        micro_rows = adapter.batch_size // config.training.micro_batches
        validation[name] = load_validation_data(
            adapter.data,
            tokenizer,
            micro_rows,
            field,
            known=tokenised,
            read=read,
            classification=classification,
        )
        report = "\n".join(
            [train_data[name].report, *(data.report for data in validation[name].values())]
        )
        if report not in reports:
            say(f"data of adapter {name!r}:")
            say(report)
        reports.setdefault(report, []).append(repr(name))
        largest = {f"{field}.train.{s}": id_ for s, id_ in train_data[name].largest_tokens.items()}
        for source, validation_data in validation[name].items():
            largest[f"{field}.validation.{source}"] = validation_data.largest_token
        _require_embeddings(largest, tokenizer, model.vocab_size)
        if adapter.data.is_packed:  # a row is of many tokens, but not all of one sequence
            _warn_of_positions({name: train_data[name].longest}, model, say)
    for first, *others in reports.values():
        if others:
            say(f"data as of adapter {first}: {', '.join(others)}")
    _warn_of_padding(config, say)
    steps = _steps(config, train_data)
    _require_warmup_to_end(config, steps)
    return Inputs(base_folder, base, model, train_data, validation, steps)


def _steps(config: RunConfig, data: Mapping[str, TrainData]) -> dict[str, int]:
    """How many steps each adapter makes.

    Args:
      config: the run's configuration.
      data: the training data of each adapter.
    """
    steps = {}
    for name in config.adapters:
        _, length = config.length_group(name)
        if length.steps is not None:
            steps[name] = length.steps
        else:
            assert length.epochs is not None
            steps[name] = data[name].batches_of_epochs(length.epochs)
    return steps


def _require_no_fork_beside_jax(config: RunConfig) -> None:
    """Refuses processes that tokenise where forking them can deadlock on locks of JAX's threads."""
    for name, adapter in config.adapters.items():
        if adapter.data.num_workers > 0 and devices_in_use():
            raise ConfigError(
                f"config.adapters.{name}.data.num_workers: {adapter.data.num_workers} processes "
                "cannot be forked once JAX has started its threads (by --distributed, or by "
                "computing before training); set 0, with which a fast tokenizer uses all cores"
            )


def _require_tasks(config: RunConfig) -> None:
    """Refuses tasks that there are not, before anything is read."""
    for name, adapter in config.adapters.items():
        for split in ("train", "validation"):
            for source, fields in getattr(adapter.data, split).items():
                if fields.task is not None:
                    with named(f"config.adapters.{name}.data.{split}.{source}"):
                        source_task(fields, config.tasks_folder)
        for task in () if adapter.evaluation is None else adapter.evaluation.tasks:
            with named(f"config.adapters.{name}.evaluation.tasks"):
                named_task(task, data=config.tasks_folder)


def devices_in_use() -> bool:
    """Whether JAX has started its devices, or the threads that connect several processes.

    JAX answers no such question, but from then on it refuses to change the number of devices.
    """
    if jax.distributed.is_initialized():
        return True
    former = jax.config.values["jax_num_cpu_devices"]
    try:
        jax.config.update("jax_num_cpu_devices", former + 2)  # -1 stands for the default
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", former)
    return False


def _warn_of_positions(
    lengths: Mapping[str, int], model: ModelConfig, say: Callable[[str], None]
) -> None:
    """Says where rows are longer than any that the base saw, unless its RoPE adapts to that.

    Args:
      lengths: tokens of the longest row of a data set, by adapter.
      model: the base's architecture.
      say: takes the lines.
    """
    longest = model.max_position_embeddings
    for name, length in lengths.items():
        if length > longest and model.rope.rope_type != "dynamic":
            say(
                f"warning: config.adapters.{name}.data.max_length: rows of up to {length} tokens, "
                f"but the base was trained on {longest} positions"
            )


def _warn_of_padding(config: RunConfig, say: Callable[[str], None]) -> None:
    """Says which rows are padded to the length of packed ones beside them."""
    packed = {
        name: adapter.data.max_length
        for name, adapter in config.adapters.items()
        if adapter.data.is_packed
    }
    longest = max(packed, key=packed.__getitem__, default="")
    for name in config.adapters:
        if packed and (name not in packed or packed[name] < packed[longest]):
            how = "packing" if name not in packed else "max_length"
            say(
                f"warning: config.adapters.{name}.data.{how}: all rows of a step are of one "
                f"length, so these are padded to the {packed[longest]} tokens of {longest!r}; "
                "pack them into rows of that length too, or train apart"
            )


def _require_embeddings(
    largest: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Refuses data sets, given by their fields, with ids that the base has no embedding for."""
    for field, token in largest.items():
        if token >= vocab_size:
            raise DataError(
                f"{field}: holds the token {tokenizer.convert_ids_to_tokens(token)!r}, id {token}, "
                f"but the base has embeddings for {vocab_size} tokens only; give a base whose "
                "embeddings cover its tokenizer"
            )


def _require_warmup_to_end(config: RunConfig, steps: Mapping[str, int]) -> None:
    for name, count in steps.items():
        warmup = config.adapters[name].optimizer.schedule.warmup_steps or 0
        if warmup >= count:
            raise ConfigError(
                f"config.adapters.{name}.optimizer.schedule.warmup_steps: {warmup} steps of "
                f"warm-up, but {name!r} trains for {count}; give fewer, or a warmup_ratio"
            )


def require_stated_architecture(config: RunConfig, model: ModelConfig, folder: Path) -> None:
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
    folder: Path, metadata: Mapping[str, Any], config: RunConfig, inputs: Inputs, step: int
) -> None:
    """Refuses to resume a state with another base or other data, or with ends it does not fit.

    Args:
      folder: the work directory, for messages.
      metadata: of the state.
      config: the configuration now.
      inputs: what was read now.
      step: the state's.
    """
    base = BaseIdentity(**metadata["base"])
    if base.fingerprint != inputs.base.fingerprint:
        raise CheckpointError(
            f"{folder}: was trained on the base {base.path}, and the weights in "
            f"{inputs.base_folder} differ from it; give that base, or another --workdir"
        )
    for name in inputs.train:
        before, now = metadata["data"].get(name, {}), inputs.data_fingerprint(name)
        changed = [part for part in now if before.get(part) != now[part]]
        # Rows of other lengths are also batched in another order, which is no second cause.
        causes = [part for part in changed if part != ORDER] or changed
        if causes:
            raise DataError(
                f"{folder}: the data of adapter {name!r} changed since the run began "
                f"({', '.join(causes)}); restore it, or give another --workdir"
            )
    for name, count in inputs.steps.items():
        former, field = metadata["steps"][name], f"config.{config.length_group(name)[0]}.steps"
        if former < step and count != former:
            raise ConfigError(
                f"{field}: {count} steps for {name!r}, but it finished at step {former}, and the "
                f"state in {folder}, at step {step}, no longer holds it; give {former}, or another "
                "--workdir"
            )
        if former >= step > count:
            raise ConfigError(
                f"{field}: {count} steps, but {folder} is at step {step}; ask for more, or give "
                "another --workdir"
            )
