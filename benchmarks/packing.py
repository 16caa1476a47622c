"""Padding, speed and compiled steps of packed rows, compared with bucketed rows.

    python benchmarks/packing.py --output packing.json
    python benchmarks/packing.py --data alpaca.json --base /path/to/llama --size 1.1b

A data set of rows with `instruction`, `input` and `output` is batched in two variants by the
package's pipeline: bucketed (each row padded to one of several lengths, with rows of similar
length) and packed (first-fit into rows of the largest length). Both variants have about the same
number of tokens in a step. A model of random weights trains MixLoRA on both alternately, a number
of steps in each round, so that disturbances affect both. Without `--data` the rows are generated
with log-normal lengths, as long-tailed as published instruction data: a tenth is longer than three
times the median. The default sizes suit a CPU of two cores.

Columns: share of padding in the tokens of an epoch; rows of the data set in a row of the batch;
rows of a step; steps of an epoch; tokens per second without padding, median and range of the
rounds; compiled FLOPs for each token without padding; number of compiled steps, and seconds of
compiling.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.compiled_flops import compiled_flops
from benchmarks.random_inputs import params_of
from benchmarks.report import (
    check_output,
    check_positive,
    machine,
    one_line,
    refuse,
    say,
    table,
    without_compilation_cache,
    write_json,
)
from benchmarks.sizes import SIZE_HELP, model_of
from benchmarks.timing import interleaved, spread
from moe_jax.adapters import METHODS
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.config.model import FloatType
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.data.batch import Batch
from moe_jax.data.pipeline import TrainData, load_train_data
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.demo.words import PLURALS
from moe_jax.errors import ConfigError, UserError
from moe_jax.training.step.program import Program, build_program

BUCKETED, PACKED = "bucketed", "packed"
"""Variants of batches of the same data."""

BASE = Path(__file__).resolve().parents[1] / "moe_jax" / "demo" / "base"
GENERATED_ROWS = 2000
MEDIAN_WORDS = 60
BUCKETS = (128, 256, 512)
SIGMA = 0.9
"""Deviation of the logarithm of a row's number of words; a tenth exceeds 3.2 times the median."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="file of rows with instruction, input, output (generated rows)")
    add("--base", type=Path, default=BASE, help="folder with a tokenizer (the demo's)")
    add("--size", default="tiny", help=SIZE_HELP)
    add("--rows", type=int, default=4, help="number of packed rows of a step (4)")
    add("--length", type=int, default=1024, help="number of tokens of packed rows (1024)")
    buckets = ",".join(map(str, BUCKETS))
    add("--buckets", help=f"other lengths of bucketed rows (of {buckets}, those below --length)")
    add(
        "--dtype",
        default="float32",
        choices=get_args(FloatType),
        help="dtype of the base and of the computation",
    )
    add("--attention", default="auto", help="ComputeConfig.attention (auto)")
    add("--rank", type=int, default=8, help="rank of every pair (8)")
    add("--steps", type=int, default=4, help="number of steps of each variant in a round (4)")
    add("--rounds", type=int, default=5, help="number of timed rounds (5)")
    add("--output", type=Path, help="JSON file for the figures")
    return parser


def check(args: argparse.Namespace) -> None:
    """Checks the flags before the data are read.

    Raises:
      ConfigError: a flag is invalid.
    """
    check_output(args.output)
    check_positive(args, ("rows", "length", "rank", "steps", "rounds"))
    if args.data is not None and not args.data.is_file():
        raise ConfigError(f"--data {args.data}: there is no such file")
    if args.buckets is None:
        args.buckets = [bucket for bucket in BUCKETS if bucket < args.length]
        return
    buckets = args.buckets.replace(",", " ").split()
    if not all(bucket.isdigit() for bucket in buckets):
        raise ConfigError("--buckets: expected whole numbers, separated by commas")
    args.buckets = sorted(set(map(int, buckets)))
    for bucket in args.buckets:
        if not 0 < bucket < args.length:
            raise ConfigError(
                f"--buckets: {bucket} is not between 1 and {args.length - 1}; leave it out, or "
                "give a larger --length"
            )


def write_generated_rows(folder: Path) -> Path:
    """Writes rows of random words with log-normal lengths."""
    rng, words, rows = random.Random(0), sorted(PLURALS), []
    for _ in range(GENERATED_ROWS):
        count = max(4, round(rng.lognormvariate(math.log(MEDIAN_WORDS), SIGMA)))
        text = rng.choices(words, k=count)
        split = rng.randint(2, max(2, count // 2))
        rows.append(
            {
                "instruction": " ".join(text[:split]),
                "input": "",
                "output": " ".join(text[split:]),
            }
        )
    file = folder / "generated.json"
    file.write_text(json.dumps(rows))
    return file


def run_config(variant: str, rows: int, path: Path, args: argparse.Namespace) -> RunConfig:
    """Configures a run on the data at `path` with `rows` rows in a step.

    Raises:
      ConfigError: a field set by a flag is invalid.
    """
    method = {
        "name": "mixlora",
        "num_experts": 8,
        "router": {"name": "top_k", "top_k": 2},
        "rank": args.rank,
        "alpha": 16.0,
        "target_modules": TARGET_MODULES,
        "losses": {"load_balance": {"coefficient": 0.01}},
    }
    data = {
        "train": {"data": {"path": str(path), "schema": "instruction"}},
        "max_length": args.length,
        "buckets": tuple(args.buckets),
        "packing": "first_fit" if variant == PACKED else "none",
    }
    adapter = {
        "method": method,
        "data": data,
        "optimizer": {"learning_rate": 1e-4, "schedule": {"kind": "constant"}},
        "batch_size": rows,
    }
    raw = {
        "base": {"path": "random", "param_dtype": args.dtype},
        "compute": {"dtype": args.dtype, "attention": args.attention},
        "mesh": {"data": 1},
        "training": {"epochs": 1.0},
        "adapters": {variant: adapter},
    }
    return parse_run_config(raw, METHODS)


class BatchingVariant:
    """Batches of one variant and training steps on them.

    Attributes:
      figures: figures of the variant by name.
    """

    def __init__(self, config: RunConfig, data: TrainData, params: Any, args: argparse.Namespace):
        """Reads an epoch of batches and compiles the steps for their lengths."""
        ((_, adapter),) = config.adapters.items()
        self._steps, self._tokens, self._params = args.steps, 0, params
        count = data.batches_of_epochs(1.0)
        self._program = program_of(config, args)
        self._batches = [next(data.iterator) for _ in range(count)]
        self._place, self._state = 0, self._program.init_state(params)
        flops = 0.0
        seconds, of_length = {}, {}
        for batch in self._batches:
            length = batch.tokens.shape[1]
            if length not in of_length:
                start = time.perf_counter()
                compiled = self._program.compiled_train_step(length)
                seconds[length] = time.perf_counter() - start
                of_length[length] = compiled_flops(compiled).total
            flops += of_length[length]
        tokens = sum(map(real_tokens, self._batches))
        places = sum(batch.tokens.size for batch in self._batches)
        self.figures: dict[str, Any] = {
            "rows_of_a_step": adapter.batch_size,
            "steps_of_an_epoch": count,
            "padding_share": 1.0 - tokens / places,
            "rows_in_a_row": sum(map(sequences, self._batches)) / (count * adapter.batch_size),
            "tokens_of_a_step": tokens / count,
            "flops_per_token": flops / tokens,
            "compiled_steps": len(seconds),
            "compile_seconds": sum(seconds.values()),
            "row_lengths": sorted(seconds),
        }

    def round(self) -> float:
        """Runs the steps of a round; returns the seconds for each token without padding."""
        tokens, start, metrics = 0, time.perf_counter(), None
        for _ in range(self._steps):
            # Spread over the epoch, so that few steps cover all row lengths.
            batch = self._batches[self._place % len(self._batches)]
            self._place += max(1, len(self._batches) // self._steps - 1)
            tokens += real_tokens(batch)
            put = self._program.put_train_batch(batch)
            self._state, metrics = self._program.train_step(self._state, self._params, put)
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - start) / tokens


def real_tokens(batch: Batch) -> int:
    """Number of tokens without padding."""
    return int((batch.segment_ids > 0).sum())


def sequences(batch: Batch) -> int:
    """Number of rows of the data set in a batch."""
    return int(((batch.segment_ids > 0) & (batch.positions == 0)).sum())


def program_of(config: RunConfig, args: argparse.Namespace) -> Program:
    """Builds the training program of a run."""
    tokenizer = load_tokenizer(args.base)
    model = model_of(args.size, max(len(tokenizer), model_of(args.size).vocab_size))
    return build_program(config, model, 10**6, jax.devices()[:1])


def measure(args: argparse.Namespace, path: Path) -> dict[str, dict[str, Any]]:
    """Measures both variants and returns their figures."""
    tokenizer = load_tokenizer(args.base)

    def data_of(variant: str, rows: int) -> tuple[RunConfig, TrainData]:
        config = run_config(variant, rows, path, args)
        data = config.adapters[variant].data
        return config, load_train_data(data, tokenizer, rows, seed=0, field="--data")

    config, data = data_of(PACKED, args.rows)
    params = params_of(program_of(config, args))
    variants = {PACKED: BatchingVariant(config, data, params, args)}
    rows = max(1, round(args.rows * variants[PACKED].figures["rows_in_a_row"]))
    variants[BUCKETED] = BatchingVariant(*data_of(BUCKETED, rows), params, args)
    say("timing")
    rounds = {variant: variants[variant].round for variant in (BUCKETED, PACKED)}
    samples, failures = interleaved(rounds, args.rounds, untimed=1)
    for variant in rounds:
        if variant in failures:
            raise ConfigError(
                f"--rows: {variant} steps ran out of memory; use fewer rows or a smaller --size"
            )
        figures = variants[variant].figures
        figures["tokens_per_second"] = spread([1 / s for s in samples[variant]])._asdict()
    ratios = [b / p for b, p in zip(samples[BUCKETED], samples[PACKED], strict=True)]
    variants[PACKED].figures["speed_ratio"] = spread(ratios)._asdict()
    ratio = (
        variants[PACKED].figures["flops_per_token"] / variants[BUCKETED].figures["flops_per_token"]
    )
    variants[PACKED].figures["flops_ratio"] = ratio
    return {variant: variants[variant].figures for variant in rounds}


def as_table(figures: dict[str, dict[str, Any]]) -> str:
    """Formats the figures as a table."""
    lines = []
    for variant, row in figures.items():
        speed = row["tokens_per_second"]
        lines.append(
            [
                variant,
                f"{row['padding_share']:.1%}",
                f"{row['rows_in_a_row']:.1f}",
                f"{row['rows_of_a_step']}",
                f"{row['steps_of_an_epoch']}",
                f"{speed['median']:,.0f} ({speed['lowest']:,.0f} to {speed['highest']:,.0f})",
                f"{row['flops_per_token'] / 1e6:,.2f}",
                f"{row['compiled_steps']} in {row['compile_seconds']:.0f} s",
            ]
        )
    headings = (
        *("variant", "padding", "rows in a row", "rows per step", "steps per epoch"),
        *("tokens/s", "MFLOP per token", "compiled steps"),
    )
    packed = figures[PACKED]
    ratio = packed["speed_ratio"]
    summary = (
        f"packed / bucketed: {ratio['median']:.2f} times the tokens per second "
        f"({ratio['lowest']:.2f} to {ratio['highest']:.2f}), {packed['flops_ratio']:.2f} times "
        "the FLOPs per token"
    )
    return "\n".join([table(headings, lines), summary])


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        check(args)
        about = machine()
        with without_compilation_cache(), tempfile.TemporaryDirectory() as folder:
            path = write_generated_rows(Path(folder)) if args.data is None else args.data
            figures = measure(args, path)
        print(f"{args.size} model, rows of {args.length} tokens; {one_line(about)}")
        print(as_table(figures))
        write_json(args.output, args, machine=about, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
