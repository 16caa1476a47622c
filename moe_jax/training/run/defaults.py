"""Settings of a run that follow from its base, its data and the memory of its devices."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.config.recipe import learning_rate_for, recipe
from moe_jax.config.run import parse_run_config
from moe_jax.data.tokenised_source import tokenise_source
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import error_prefix
from moe_jax.hf.base_model import BaseModel, open_base
from moe_jax.training.records.plan import free_memory, memory_plan, readable
from moe_jax.training.step.program import build_program

LONGEST_ROW = 2048
"""Largest `max_length` that is chosen, in tokens; longer rows are truncated."""

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
    base: str, data: str, *, schema: str | None, method: str, say: Callable[[str], None]
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

    Returns:
      Plain nested mappings, as `parse_run_config` takes them.

    Raises:
      UserError: the base or the data cannot be read.
    """
    say(f"choosing settings for {base} and {data}")
    with error_prefix("--base"):
        model = open_base(base)
    with error_prefix("--data"):
        lengths = _row_lengths(data, schema, model)
    max_length, buckets = _lengths(lengths)
    held_out = min(MOST_HELD_OUT, int(HELD_OUT_SHARE * len(lengths)))
    width = model.config.hidden_size
    on_cpu = jax.default_backend() == "cpu"
    config = recipe(
        base,
        dtype="float32" if on_cpu else "bfloat16",  # bfloat16 is faster with AMX alone
        attention="cudnn" if jax.default_backend() == "gpu" else "xla",
        data_axis=-1,
        fsdp=1,
        method=method,
        rank=8 if width < NARROW else 16,
        data=data,
        schema=schema,
        held_out=str(held_out) if held_out else None,
        max_length=max_length,
        buckets=buckets,
        learning_rate=learning_rate_for(width),
    )
    del config["base"]["hf_config"]
    for note in _fit_memory(config, model):
        say(note)
    return config


def _row_lengths(data: str, schema: str | None, base: BaseModel) -> np.ndarray:
    """Tokens of each row, at most `LONGEST_ROW` and the base's context."""
    fields: dict[str, Any] = {"path": data, **({} if schema is None else {"schema": schema})}
    source = SourceConfig(**fields)
    longest = min(LONGEST_ROW, base.config.max_position_embeddings)
    data_config = DataConfig(train={"train": source}, max_length=longest)
    return tokenise_source("train", source, data_config, load_tokenizer(base.folder)).lengths


def _lengths(lengths: np.ndarray) -> tuple[int, tuple[int, ...]]:
    """`max_length` for the longest row, and buckets for the shorter half and nine tenths."""
    longest, *shorter = (
        -(-int(length) // LENGTH_STEP) * LENGTH_STEP
        for length in (lengths.max(), *np.quantile(lengths, (0.5, 0.9)))
    )
    buckets = sorted({length for length in shorter if length <= 0.75 * longest})
    return longest, tuple(buckets)


def _fit_memory(config: dict[str, Any], base: BaseModel) -> list[str]:
    """Sets `training.micro_batches` so that a step fits a device; returns notes.

    The memory of a step is nearly linear in the rows of a micro-batch. So a step with all rows and
    one with the fewest tell which number may fit, and only that one is compiled besides.
    """
    if free_memory() is None:
        return []
    adapter, training = config["adapters"]["default"], config["training"]

    def needed(micro_batches: int) -> int | None:
        training["micro_batches"] = micro_batches
        parsed = parse_run_config(copy.deepcopy(config), METHODS)
        plan = memory_plan(build_program(parsed, base.config, 1), adapter["data"]["max_length"])
        return None if plan is None else plan.peak

    whole = needed(1)
    # After a compilation: what it took of a host's memory stays with the process.
    free = free_memory()
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
