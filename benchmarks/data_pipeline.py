"""Speed of tokenizing a data set and of drawing batches from it.

    python benchmarks/data_pipeline.py --output data_pipeline.json
    python benchmarks/data_pipeline.py --consumed 100000 --rows 64

Generated rows are read and tokenized without a cache, read again from the cache, and drawn as the
training loop draws them: shuffled, grouped by length, padded, joined into one batch. No device is
used. The last column is the ratio to the tokens per second that training consumes (`--consumed`);
above 1, the device never waits for data. The default is the fastest published LoRA of a 7B model on
one H100, NeMo's with 25,206 tokens per second.

The tokenizer is small and trained for this benchmark; a larger vocabulary is about as fast.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.generated_run import ROWS, run_config, write_rows, write_tokenizer
from benchmarks.report import (
    check_output,
    check_positive,
    machine,
    one_line,
    refuse,
    say,
    table,
    write_json,
)
from benchmarks.timing import spread
from moe_jax.config.data import DataConfig
from moe_jax.data.pipeline import TrainData, load_train_data
from moe_jax.data.tokenized_source import tokenize_source
from moe_jax.errors import UserError
from moe_jax.training.step.micro_batches import join_rows

WARM_UP = 16
"""Number of batches drawn before timing starts, more than are prefetched."""


def data_config(folder: Path, cache: Path, args: argparse.Namespace) -> DataConfig:
    """Data configuration of the generated rows with a cache folder."""
    data = {"max_length": args.length, "cache_dir": str(cache)}
    config = run_config(folder, 1, args.rows, data, training={"steps": 1})
    return config.adapters["adapter0"].data


def draw(data: TrainData, batches: int) -> tuple[float, int]:
    """Draws batches; returns the seconds and the number of tokens without padding."""
    for _ in range(WARM_UP):
        next(data.iterator)
    tokens, start = 0, time.perf_counter()
    for _ in range(batches):
        batch = join_rows([next(data.iterator)])
        tokens += int((batch.segment_ids > 0).sum())
    return time.perf_counter() - start, tokens


def figure(
    stage: str, rows: int, tokens: int, seconds: list[float], consumed: float
) -> dict[str, Any]:
    """Figures of one stage from the seconds of its repeats."""
    rates = spread([tokens / duration for duration in seconds])
    return {
        "stage": stage,
        "rows": rows,
        "tokens": tokens,
        "seconds": spread(seconds)._asdict(),
        "rows_per_second": rows * rates.median / tokens,
        "tokens_per_second": rates._asdict(),
        "times_consumed": rates.median / consumed,
    }


def measure(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of the three stages: tokenizing, reading the cache, drawing batches."""
    tokenizer = write_tokenizer(folder)
    say(f"writing {args.examples} rows")
    write_rows(folder / ROWS, args.examples)
    fresh, cached, drawn = [], [], []
    rows = tokens = drawn_tokens = 0
    for turn in range(args.repeats):
        say(f"round {turn + 1} of {args.repeats}")
        config = data_config(folder, folder / f"cache{turn}", args)
        ((name, fields),) = config.train.items()
        for seconds in (fresh, cached):
            start = time.perf_counter()
            source = tokenize_source(name, fields, config, tokenizer)
            seconds.append(time.perf_counter() - start)
            rows, tokens = len(source.kept), int(source.lengths.sum())
        duration, drawn_tokens = draw(
            load_train_data(config, tokenizer, args.rows, seed=0), args.batches
        )
        drawn.append(duration)
    return [
        figure("tokenized without a cache", rows, tokens, fresh, args.consumed),
        figure("read from the cache", rows, tokens, cached, args.consumed),
        figure("drawn as batches", args.batches * args.rows, drawn_tokens, drawn, args.consumed),
    ]


def table_cells(figure: dict[str, Any]) -> list[str]:
    return [
        figure["stage"],
        f"{figure['rows']:,}",
        f"{figure['seconds']['median']:.2f} s",
        f"{figure['rows_per_second']:,.0f}",
        f"{figure['tokens_per_second']['median']:,.0f}",
        f"{figure['times_consumed']:,.1f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--examples", type=int, default=50_000, help="number of rows of the data set (50000)"
    )
    parser.add_argument("--rows", type=int, default=16, help="number of rows of a batch (16)")
    parser.add_argument(
        "--length", type=int, default=512, help="maximum number of tokens of a row (512)"
    )
    parser.add_argument("--batches", type=int, default=500, help="number of batches drawn (500)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="number of repeats of each measurement (3)"
    )
    parser.add_argument(
        "--consumed", type=float, default=25_206.0, help="tokens per second of training (25206)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
        check_positive(args, ("examples", "rows", "length", "batches", "repeats", "consumed"))
        facts = machine()
        print(
            f"{args.examples:,} rows, batches of {args.rows} x up to {args.length} tokens; "
            f"{one_line(facts)}"
        )
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(Path(folder), args)
        headings = ("stage", "rows", "time", "rows/s", "tokens/s", "/ consumed")
        print(table(headings, [table_cells(figure) for figure in figures]))
        write_json(args.output, args, benchmark="data_pipeline", machine=facts, figures=figures)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
