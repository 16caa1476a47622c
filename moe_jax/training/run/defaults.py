"""Settings of a run that follow from its base, its data and the memory of its devices."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import ROOT, parse
from moe_jax.config.preference import PreferenceConfig
from moe_jax.config.recipe import (
    ALL_PROJECTIONS,
    DELTA_NET_PROJECTIONS,
    data_sets,
    learning_rate_for,
    recipe,
)
from moe_jax.config.run import parse_run_config
from moe_jax.data.sources import read_source
from moe_jax.data.token_table import STORED_LENGTH
from moe_jax.data.tokenized_source import tokenize_source
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import error_prefix
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.sharding.mesh import platform_of
from moe_jax.training.records.plan import free_memory, memory_plan, readable
from moe_jax.training.step.program import build_program

LENGTH_STEP = 32
"""Lengths are multiples of it."""

HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 500
"""Share of the rows that is kept for validation, and its largest number of rows."""

USABLE_MEMORY = 0.9
"""Share of a device's free memory that a step may be planned to take.

Runs of SmolLM2-135M on a CPU took 0.95 and 1.05 times the `MemoryPlan.peak` of what was free after
the first compilation; see `process_plan`."""

MAX_MICRO_BATCHES = 16

NARROW = 1024
"""Width below which experts and pairs have half the rank."""


def default_config(
    base: str,
    data: str,
    *,
    schema: str | None,
    method: str,
    say: Callable[[str], None],
    devices: Sequence[Any] | None = None,
    memory: int | None = None,
    max_length: int | None = None,
    preference: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Chooses a configuration for a base and a data set.

    The learning rate follows from the width of the base, the lengths from the rows, and the number
    of micro-batches from the memory of a device. The other settings are those of `recipe`.

    Args:
      base: folder or hub id of the base model.
      data: file, folder, pattern or hub id of the training data.
      schema: schema of the rows; None finds it from the columns.
      method: name of the method.
      say: prints a line.
      devices: devices of the run, which may be absent; None for all of the process.
      memory: bytes of memory of an absent device; None for what is free.
      max_length: `data.max_length`; None takes the length of the longest row.
      preference: name of the preference loss; None trains on answers as they are.
      columns: column names by field of the schema, where they differ.

    Returns:
      Plain nested mappings, as `parse_run_config` takes them.

    Raises:
      UserError: the base or the data cannot be read.
    """
    loss = None
    if preference is not None:
        fields = {"name": preference}
        loss = parse(PreferenceConfig, fields, f"{ROOT}.adapters.default.preference")
        schema = schema or loss.schema
    say(f"choosing settings for {base} and {data}")
    with error_prefix("--base"):
        model = open_base(base)
    with error_prefix("--data"):
        sets = data_sets(data, schema, None, columns)
        held_out = _held_out(_data_config(sets, model).train["train"])
        sets = data_sets(data, schema, held_out, columns)
        lengths = _row_lengths(_data_config(sets, model), model, loss)
    max_length, buckets = _lengths(lengths, max_length)
    width = model.config.hidden_size
    platform = platform_of(devices)
    config = recipe(
        base,
        dtype="float32" if platform == "cpu" else "bfloat16",  # bfloat16 is faster with AMX alone
        data_axis=-1,
        fsdp=1,
        method=method,
        rank=8 if width < NARROW else 16,
        target_modules=_targets(model.config),
        data=data,
        schema=schema,
        columns=columns,
        held_out=held_out,
        max_length=max_length,
        buckets=buckets,
        learning_rate=learning_rate_for(width, preference),
        preference=preference,
    )
    del config["base"]["hf_config"]
    for note in _fit_memory(config, model, devices, memory):
        say(note)
    return config


def _targets(model: ModelConfig) -> tuple[str, ...]:
    """The wide projections of the model."""
    return ALL_PROJECTIONS + (() if model.delta_net is None else DELTA_NET_PROJECTIONS)


def _data_config(sets: Mapping[str, Any], base: BaseModel) -> DataConfig:
    """Data sets of the run, from `data_sets`, with the longest rows that may be chosen."""
    longest = min(STORED_LENGTH, base.config.max_position_embeddings)
    fields = {**sets, "max_length": longest}
    return parse(DataConfig, fields, f"{ROOT}.adapters.default.data")


def _held_out(source: SourceConfig) -> str | None:
    """Number of rows that are held out, as `recipe` takes it."""
    rows = len(read_source(source, None).rows)
    count = min(MOST_HELD_OUT, int(HELD_OUT_SHARE * rows))
    return str(count) if count else None


def _row_lengths(
    config: DataConfig, base: BaseModel, preference: PreferenceConfig | None
) -> np.ndarray:
    """Tokens of each row. The run finds them in the cache: its data sets are the same."""
    tokenizer = load_tokenizer(base.folder)
    sources = [*config.train.items(), *config.validation.items()]
    return np.concatenate(
        [
            tokenize_source(name, source, config, tokenizer, preference=preference).lengths
            for name, source in sources
        ]
    )


def _lengths(lengths: np.ndarray, longest: int | None) -> tuple[int, tuple[int, ...]]:
    """`max_length` for the longest row, and buckets for the shorter half and nine tenths."""
    of_rows, *shorter = (
        -(-int(length) // LENGTH_STEP) * LENGTH_STEP
        for length in (lengths.max(), *np.quantile(lengths, (0.5, 0.9)))
    )
    longest = of_rows if longest is None else longest
    buckets = sorted({length for length in shorter if length <= 0.75 * longest})
    return longest, tuple(buckets)


def _fit_memory(
    config: dict[str, Any],
    base: BaseModel,
    devices: Sequence[Any] | None = None,
    memory: int | None = None,
) -> list[str]:
    """Sets `training.micro_batches` so that a step fits a device; returns notes.

    The memory of a step is nearly linear in the rows of a micro-batch. So a step with all rows and
    one with the fewest tell which number may fit, and only that one is compiled besides.
    """
    if memory is None and free_memory() is None:
        return []
    adapter, training = config["adapters"]["default"], config["training"]

    def needed(micro_batches: int) -> int | None:
        training["micro_batches"] = micro_batches
        parsed = parse_run_config(copy.deepcopy(config), METHODS)
        program = build_program(parsed, base.config, 1, devices)
        plan = memory_plan(program, adapter["data"]["max_length"])
        return None if plan is None else plan.peak

    whole = needed(1)
    # After a compilation: what it took of a host's memory stays with the process.
    free = free_memory() if memory is None else memory
    if whole is None or free is None or whole <= USABLE_MEMORY * free:
        return []
    least = needed(MAX_MICRO_BATCHES)
    assert least is not None
    if least > USABLE_MEMORY * free:
        advice = "--config.base.param_dtype=nf4 or --config.compute.remat=full"
        sizes = f"{readable(least)} of a device, and {readable(free)} are free"
        return [f"warning: a step needs {sizes}: try {advice}"]
    for_all_rows = (whole - least) / (1 - 1 / MAX_MICRO_BATCHES)
    for count in (2, 4, 8):
        expected = least + for_all_rows * (1 / count - 1 / MAX_MICRO_BATCHES)
        if expected <= USABLE_MEMORY * free and (needed(count) or 0) <= USABLE_MEMORY * free:
            return []
    training["micro_batches"] = MAX_MICRO_BATCHES
    return []
