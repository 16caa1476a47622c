"""Checks of a run's configuration against its base model and data, and warnings."""

import fnmatch
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_jax.adapters.method import METHODS
from moe_jax.adapters.new_tokens import token_range
from moe_jax.checkpoints.adapter_files import read_description
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import parse_member, to_plain
from moe_jax.config.run import RunConfig
from moe_jax.data.pipeline import TrainData
from moe_jax.errors import CheckpointError, ConfigError, DataError, error_prefix
from moe_jax.hf.base_model import BaseModel
from moe_jax.hf.config import model_config_from_hf
from moe_jax.tasks.selection import named_task
from moe_jax.tasks.training_rows import source_task
from moe_jax.training.run.workdir import flat_fields

TRAINING_ONLY_FIELDS = (
    "classification.init_std",
    "classification.metrics",
    "dropout",
    "expert_lora.dropout",
    "ffn_dropout",
    "init",
    "losses*",
    "router.init_std",
    "router.jitter_noise",
)
"""Fields of a method that only training reads: with given weights, none changes the output."""


def require_known_tasks(config: RunConfig) -> None:
    """Raises `ConfigError` for a task that does not exist; reads no data."""
    for name, adapter in config.adapters.items():
        for split in ("train", "validation"):
            for source, fields in getattr(adapter.data, split).items():
                if fields.task is not None:
                    with error_prefix(f"config.adapters.{name}.data.{split}.{source}"):
                        source_task(fields, config.tasks_folder)
        for task in () if adapter.evaluation is None else adapter.evaluation.tasks:
            with error_prefix(f"config.adapters.{name}.evaluation.tasks"):
                named_task(task, data=config.tasks_folder)


def require_specified_architecture(config: RunConfig, model: ModelConfig, folder: Path) -> None:
    """Raises `ConfigError` if `config.base.hf_config` differs from the checkpoint in `folder`."""
    if config.base.hf_config is None:
        return
    specified = model_config_from_hf(config.base.hf_config, "config.base.hf_config")
    for name, value in vars(model).items():
        if not _agrees(getattr(specified, name), value):
            raise ConfigError(
                f"config.base.hf_config: says {name} {getattr(specified, name)!r}, but {folder} "
                f"has {value!r}; correct it, or leave hf_config out"
            )


def require_initial_adapters(config: RunConfig, base: BaseModel) -> None:
    """Requires that the adapters in `start_from` fit the base and the methods; reads no weights.

    Raises:
      ConfigError: a method differs; names the field.
      CheckpointError: a folder holds no adapter, or one of another base.
    """
    for name, adapter in config.adapters.items():
        if adapter.start_from is None:
            continue
        folder = Path(adapter.start_from).expanduser()
        with error_prefix(f"config.adapters.{name}.start_from"):
            description = read_description(folder)
            base.require_trained_on(
                str(folder), description.base, "give that base, or another adapter", later=True
            )
            try:
                saved = parse_member(METHODS, description.method, "method")
            except ConfigError as error:
                raise CheckpointError(f"{folder}: {error}") from None
            _require_same_method(to_plain(saved), to_plain(adapter.method), folder)


def _require_same_method(saved: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    saved, given, absent = flat_fields(saved), flat_fields(given), object()
    for field in ("name", *sorted(saved.keys() | given.keys())):
        values = saved.get(field, absent), given.get(field, absent)
        may_differ = any(fnmatch.fnmatchcase(field, pattern) for pattern in TRAINING_ONLY_FIELDS)
        if values[0] != values[1] and not may_differ:
            shown = ["absent" if value is absent else repr(value) for value in values]
            raise ConfigError(
                f"{folder} has method.{field} {shown[0]}, and the configuration {shown[1]}; give "
                "the adapter's method, which `moe-jax show` prints"
            )


def require_warmup_to_end(config: RunConfig, steps: Mapping[str, int]) -> None:
    """Raises `ConfigError` if an adapter has no step after its warm-up; `steps` by adapter."""
    for name, count in steps.items():
        warmup = config.adapters[name].optimizer.schedule.warmup_steps or 0
        if warmup >= count:
            raise ConfigError(
                f"config.adapters.{name}.optimizer.schedule.warmup_steps: {warmup} steps of "
                f"warm-up, but {name!r} trains for {count}; give fewer, or a warmup_ratio"
            )


def require_embeddings(
    largest: Mapping[str, int], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    """Raises `DataError` if a data set has a token that the base has no embedding for.

    Args:
      largest: largest token id of each data set, by its config field.
      tokenizer: tokenizer of the base.
      vocab_size: number of embeddings.
    """
    for field, token in largest.items():
        if token >= vocab_size:
            raise DataError(
                f"{field}: holds the token {tokenizer.convert_ids_to_tokens(token)!r}, id {token}, "
                f"but the base has embeddings for {vocab_size} tokens only; give a base whose "
                "embeddings cover its tokenizer"
            )


def warn_of_positions(
    lengths: Mapping[str, int], model: ModelConfig, say: Callable[[str], None]
) -> None:
    """Warns of rows longer than those of pretraining, unless RoPE scales with the length.

    Args:
      lengths: tokens of the longest row, by adapter.
      model: architecture of the base.
      say: prints a line.
    """
    longest = model.max_position_embeddings
    for name, length in lengths.items():
        if length > longest and model.rope.rope_type != "dynamic":
            say(
                f"warning: config.adapters.{name}.data.max_length: rows of up to {length} tokens, "
                f"but the base was trained on {longest} positions"
            )


def warn_of_unseen_tokens(
    config: RunConfig, train: Mapping[str, TrainData], vocab_size: int, say: Callable[[str], None]
) -> None:
    """Warns of new tokens that no training row holds; not of streamed data, where it is unknown.

    Args:
      config: configuration of the run, with the ids of new tokens.
      train: training data by adapter.
      vocab_size: number of embeddings of the base.
      say: prints a line.
    """
    unseen = dict[str, list[str]]()
    for name, adapter in config.adapters.items():
        new, found = token_range(adapter.method, vocab_size), train[name].found_tokens
        if new is None or found is None:
            continue
        ids = range(new.first, new.stop)
        held = found(ids)
        tokens = zip(ids, adapter.method.new_tokens, strict=True)
        missing = ", ".join(repr(token) for number, token in tokens if number not in held)
        if missing:
            unseen.setdefault(missing, []).append(name)
    for missing, (first, *others) in unseen.items():
        also = f" (and of {', '.join(map(repr, others))})" if others else ""
        say(
            f"warning: config.adapters.{first}.method.new_tokens{also}: no training row holds "
            f"{missing}, so no use of it is learned; correct the token or the rows, or leave it out"
        )


def warn_of_padding(config: RunConfig, say: Callable[[str], None]) -> None:
    """Warns of adapters whose own rows are shorter than the packed rows of another adapter."""
    packed = {
        name: adapter.data.max_length
        for name, adapter in config.adapters.items()
        if adapter.data.is_packed
    }
    longest = max(packed, key=packed.__getitem__, default="")
    for name, adapter in config.adapters.items():
        shortest = packed.get(name, adapter.data.lengths[0])
        if packed and shortest < packed[longest]:
            field = "packing" if name not in packed else "max_length"
            say(
                f"warning: config.adapters.{name}.data.{field}: all rows of a step are of one "
                f"length, so these are padded to the {packed[longest]} tokens of {longest!r}; "
                "pack them into rows of that length too, or train the adapters in separate runs"
            )


def _agrees(specified: Any, value: Any) -> bool:
    """True for equal values; floats may differ by their rounding to float32 in some converter."""
    if isinstance(specified, float) and isinstance(value, float):
        return math.isclose(specified, value, rel_tol=1e-6)
    return specified == value
