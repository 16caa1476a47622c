"""Inputs of a run besides weights: base model, data, and the steps that follow from them."""

import functools
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.new_tokens import total_vocab_size
from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import DataConfig
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import located
from moe_jax.config.preference import ROWS_PER_EXAMPLE, PreferenceConfig
from moe_jax.config.run import RunConfig
from moe_jax.data.new_tokens import load_extended_tokenizer, with_token_id
from moe_jax.data.pipeline import (
    ORDER,
    TrainData,
    ValidationData,
    load_train_data,
    load_validation_data,
)
from moe_jax.data.streaming import load_streamed_data
from moe_jax.data.tokenized_source import TokenizedSource
from moe_jax.errors import ConfigError, DataError, error_prefix
from moe_jax.hf.base_model import BaseIdentity, BaseModel, open_base
from moe_jax.loaded.rank_match import match_ranks
from moe_jax.sharding.mesh import make_mesh
from moe_jax.tasks.training_rows import read_source_or_task
from moe_jax.training.run.input_checks import (
    require_embeddings,
    require_initial_adapters,
    require_known_tasks,
    require_specified_architecture,
    require_warmup_to_end,
    warn_of_padding,
    warn_of_positions,
    warn_of_unseen_tokens,
)
from moe_jax.training.step.program_checks import require_divisible_rows, require_fitting_methods

TrainSets = dict[str, TrainData]
"""Training data by adapter."""

ValidationSets = dict[str, dict[str, ValidationData]]
"""Validation sets by adapter and name."""


class Phase(NamedTuple):
    """Part of a run in which the same adapters train.

    Attributes:
      start: steps before the phase.
      stop: steps at its end.
      adapters: adapters that train in it.
      ending: those of them whose last step is the last of the phase.
    """

    start: int
    stop: int
    adapters: tuple[str, ...]
    ending: tuple[str, ...]


def phases_of(steps: Mapping[str, int]) -> tuple[Phase, ...]:
    """Phases of a run whose adapters all begin at step 0.

    Args:
      steps: total steps of each adapter, in the order of their rows in a batch.
    """
    phases, start = [], 0
    for stop in sorted(set(steps.values())):
        adapters = tuple(name for name, count in steps.items() if count >= stop)
        ending = tuple(name for name, count in steps.items() if count == stop)
        phases.append(Phase(start, stop, adapters, ending))
        start = stop
    return tuple(phases)


def phases_after(phases: tuple[Phase, ...], step: int) -> tuple[Phase, ...]:
    """Phases from the one that contains `step` on; from the first one for step 0.

    The last step of a phase is part of it: the state after it still holds the ending adapters.
    """
    return tuple(phase for phase in phases if step <= phase.stop)


@dataclass
class Progress:
    """Position of a run; saved with each training state.

    Attributes:
      step: optimizer steps done.
      validation: validation losses measured last, by `adapter/set`.
      best: mean validation loss of the best adapter so far, by adapter.
      best_accuracy: mean validation accuracy of it, where that decides (`preference.keep_best`).
      unevaluated: adapters whose evaluation on tasks after `step` a signal has interrupted.
    """

    step: int
    validation: dict[str, float]
    best: dict[str, float]
    best_accuracy: dict[str, float] = field(default_factory=dict)
    unevaluated: Sequence[str] = ()

    def is_best(self, name: str, loss: float, accuracy: float | None) -> bool:
        """True if an adapter is better than before; it is then remembered.

        Args:
          name: name of the adapter.
          loss: mean loss of its validation sets.
          accuracy: mean accuracy of them, where that decides, and the loss among equal ones.
        """
        before = (-self.best_accuracy.get(name, -math.inf), self.best.get(name, math.inf))
        if accuracy is None:
            is_best = loss < before[1]
        else:
            is_best = (-accuracy, loss) < before
        if is_best:
            self.best[name] = loss
            if accuracy is not None:
                self.best_accuracy[name] = accuracy
        return is_best


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run besides weights.

    Attributes:
      config: configuration of the run, with the ranks and the ids of new tokens.
      rank_notes: see `MatchedRanks.notes`.
      base: base model, its weights not loaded.
      train: training data of each adapter.
      validation: validation sets of each adapter, by name.
      steps: total optimizer steps of each adapter.
    """

    config: RunConfig
    rank_notes: dict[str, str]
    base: BaseModel
    train: TrainSets
    validation: ValidationSets
    steps: dict[str, int]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return max(self.steps.values())

    def data_fingerprint(self, adapter: str) -> dict[str, str]:
        """Digests of an adapter's training and validation data, by part."""
        sets = self.validation[adapter].items()
        validation = {f"validation/{name}": data.digest for name, data in sets}
        return {**self.train[adapter].fingerprint, **validation}


def _with_token_ids(config: RunConfig, base: BaseModel) -> RunConfig:
    """The configuration with the ids of the adapters' new tokens, by the base's tokenizer."""
    adapters = {}
    for name, adapter in config.adapters.items():
        with located(f"config.adapters.{name}.method"):
            adapters[name] = replace(adapter, method=with_token_id(adapter.method, base))
    return replace(config, adapters=adapters)


def read_inputs(config: RunConfig, say: Callable[[str], None], *, resumes: bool = False) -> Inputs:
    """Reads the inputs of a run; quick checks come first.

    Args:
      config: configuration of the run.
      say: prints a line.
      resumes: the run has a training state, so that `start_from` is not read.

    Raises:
      UserError: the configuration, base, data or devices are invalid or do not fit together.
    """
    require_known_tasks(config)
    with error_prefix("config.base.path"):
        base = open_base(config.base.path, config.base.revision)
    require_specified_architecture(config, base.config, base.folder)
    ranks = match_ranks(config.methods, base.config)
    config = _with_token_ids(ranks.apply(config), base)
    require_fitting_methods(config, base.config)
    lengths = {name: config.length_group(name)[1].steps for name in config.adapters}
    require_warmup_to_end(config, {name: n for name, n in lengths.items() if n is not None})
    configs = {name: adapter.data for name, adapter in config.adapters.items()}
    unpacked = {name: data.max_length for name, data in configs.items() if not data.is_packed}
    warn_of_positions(unpacked, base.config, say)
    if not resumes:
        require_initial_adapters(config, base)
    require_divisible_rows(config, make_mesh(config.mesh))

    say("reading the data")
    methods = [adapter.method for adapter in config.adapters.values()]
    tokenizer = load_extended_tokenizer(base.folder, base.config, methods)
    _tokenize_in_processes(config, base)
    train, validation = _load_data(config, tokenizer, base.config.vocab_size, say)
    for name, train_set in train.items():
        field = f"config.adapters.{name}.data"
        largest = {f"{field}.train.{source}": n for source, n in train_set.largest_tokens.items()}
        for source, validation_set in validation[name].items():
            largest[f"{field}.validation.{source}"] = validation_set.largest_token
        vocab_size = total_vocab_size(base.config.vocab_size, [config.adapters[name].method])
        require_embeddings(largest, tokenizer, vocab_size)
        if configs[name].is_packed:  # positions count within a sequence of the row
            warn_of_positions({name: train_set.longest}, base.config, say)
    warn_of_padding(config, say)
    warn_of_unseen_tokens(config, train, base.config.vocab_size, say)
    steps = _total_steps(config, train)
    require_warmup_to_end(config, steps)
    return Inputs(config, ranks.notes, base, train, validation, steps)


def _tokenize_in_processes(config: RunConfig, base: BaseModel) -> None:
    """Fills the cache of tokenized data where `num_workers` is given.

    The workers are forked from a fresh process, since they can deadlock if they are forked from
    this one, on locks that threads of JAX hold.
    """
    fields = {
        f"config.adapters.{name}.data": (
            adapter.data,
            adapter.method.classification,
            adapter.preference,
        )
        for name, adapter in config.adapters.items()
        if adapter.data.num_workers > 1
    }
    if not fields:
        return
    methods = [adapter.method for adapter in config.adapters.values()]
    files = base.folder, base.config
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(_fill_token_cache, fields, *files, methods, config.tasks_folder).result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"{next(iter(fields))}.num_workers: the process that tokenizes did not start; a script "
            "that trains needs `if __name__ == '__main__':`, or set 0"
        ) from error


def _fill_token_cache(
    fields: Mapping[str, tuple[DataConfig, ClassificationConfig | None, PreferenceConfig | None]],
    base: Path,
    model: ModelConfig,
    methods: Sequence[AdapterMethod],
    tasks_folder: str | None,
) -> None:
    tokenizer = load_extended_tokenizer(base, model, methods)
    tokenized = dict[str, TokenizedSource]()
    for place, (data, classification, preference) in fields.items():
        options = _loading_options(classification, preference, tasks_folder, tokenized)
        load_train_data(data, tokenizer, ROWS_PER_EXAMPLE, 0, place, **options)
        load_validation_data(data, tokenizer, ROWS_PER_EXAMPLE, place, **options)


def _loading_options(
    classification: ClassificationConfig | None,
    preference: PreferenceConfig | None,
    tasks_folder: str | None,
    tokenized: dict[str, TokenizedSource],
) -> dict[str, Any]:
    """Options for training and validation data of an adapter; equal sets are tokenized once."""
    is_classified = classification is not None
    read = functools.partial(read_source_or_task, folder=tasks_folder, classified=is_classified)
    return {
        "token_cache": tokenized,
        "reader": read,
        "classification": classification,
        "preference": preference,
    }


def _load_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    say: Callable[[str], None],
) -> tuple[TrainSets, ValidationSets]:
    """Loads the data of all adapters; equal data sets once."""
    train, validation = TrainSets(), ValidationSets()
    tokenized: dict[str, TokenizedSource] = {}
    reports: dict[str, list[str]] = {}
    for name, adapter in config.adapters.items():
        field, classification = f"config.adapters.{name}.data", adapter.method.classification
        options = _loading_options(
            classification, adapter.preference, config.tasks_folder, tokenized
        )
        data = replace(adapter.data, num_workers=0)  # see `_tokenize_in_processes`
        place = (data, tokenizer, adapter.batch_size, config.seed(name), field)
        seed = config.training.seed
        if data.streaming:
            size = total_vocab_size(vocab_size, [adapter.method])
            train[name] = load_streamed_data(*place, vocab_size=size, grouping_seed=seed, say=say)
        else:
            train[name] = load_train_data(*place, grouping_seed=seed, **options)
        micro_rows = adapter.batch_size // config.training.micro_batches
        validation[name] = load_validation_data(data, tokenizer, micro_rows, field, **options)
        data_sets = [train[name], *validation[name].values()]
        report = "\n".join(data.report for data in data_sets)
        if report not in reports:
            say(f"data of adapter {name!r}:")
            say(report)
        reports.setdefault(report, []).append(repr(name))
    for first, *others in reports.values():
        if others:
            say(f"data as of adapter {first}: {', '.join(others)}")
    return train, validation


def _total_steps(config: RunConfig, train: Mapping[str, TrainData]) -> dict[str, int]:
    """Total optimizer steps of each adapter."""
    steps = {}
    for name in config.adapters:
        _, length = config.length_group(name)
        if length.steps is not None:
            steps[name] = length.steps
        else:
            assert length.epochs is not None
            steps[name] = train[name].batches_of_epochs(length.epochs)
    return steps


def require_same_inputs(
    folder: Path, metadata: Mapping[str, Any], config: RunConfig, inputs: Inputs, step: int
) -> None:
    """Requires the base, data and lengths that a saved training state can continue with.

    Args:
      folder: work directory, for messages.
      metadata: metadata of the state.
      config: configuration of this run.
      inputs: inputs of this run.
      step: step of the state.

    Raises:
      CheckpointError: the state belongs to another base.
      DataError: the data has changed.
      ConfigError: the number of steps does not go with the state.
    """
    trained_on = BaseIdentity(**metadata["base"])
    inputs.base.require_trained_on(
        str(folder), trained_on, "give that base, or another --workdir", later=True
    )
    for name in inputs.train:
        before, now = metadata["data"].get(name, {}), inputs.data_fingerprint(name)
        changed = [part for part in now if before.get(part) != now[part]]
        # Rows of other lengths also change the order of batches; that is no second cause.
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
                f"{field}: {count} steps, but {folder} is at step {step}; set a larger number, "
                "or give another --workdir"
            )
