"""Cost and speed of the experts' products in one-hot and grouped form.

    python benchmarks/grouped.py
    python benchmarks/grouped.py --size d512 --time --output benchmarks/grouped_d512.json

The parts `activations` and `expansion` are the two low-rank products of one gate or up projection,
forward and backward to their input and to the experts' matrices, in the forms of
`dispatch_forms.py`. The part `layer` is a whole decoder layer: the package's MixLoRA, the same with
tokens sorted by expert (`grouped_mixlora.py`), and LoRA with equal trainable parameters. FLOPs and
temporary memory are read from the compiled program, without weights. `--time` also times the
program with random weights and random routing on an idle machine; the forms alternate.

The grouped forms compute as many blocks as the most unequal routing needs.

Needs jax and flax only.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from benchmarks import dispatch_forms as forms
from benchmarks.compiled_flops import compiled_flops
from benchmarks.dispatch_forms import BATCHED, GROUPED, ONE_HOT, RAGGED, WALKS
from benchmarks.grouped_mixlora import GroupedMixLora, group_mixlora
from benchmarks.layer_cost import LAYERS, METHODS, Shape, layer_step
from benchmarks.random_inputs import random_like
from benchmarks.report import (
    MEBIBYTE,
    check_output,
    check_positive,
    machine,
    one_line,
    refuse,
    say,
    table,
    write_json,
)
from benchmarks.sizes import SIZE_HELP, model_of
from benchmarks.timing import interleaved, seconds_of, spread
from moe_jax.adapters.method import AdapterMethod
from moe_jax.config.model import ComputeConfig
from moe_jax.errors import ConfigError, UserError

LOW_RANK, EXPANSION, LAYER, LORA = "activations", "expansion", "layer", "lora"
FORMS_OF_PART = {
    LOW_RANK: (ONE_HOT, GROUPED, BATCHED, RAGGED),
    EXPANSION: (ONE_HOT, GROUPED, BATCHED, RAGGED),
    LAYER: (ONE_HOT, GROUPED, BATCHED, LORA),
}
ALL_FORMS = tuple(
    dict.fromkeys(form for part_forms in FORMS_OF_PART.values() for form in part_forms)
)
REMAT = ComputeConfig(dtype="float32").remat
MOST_OF_MEMORY = 0.8


class Case(NamedTuple):
    """One form of one part.

    Attributes:
      program: function of the operands.
      operands: shapes and dtypes of the operands.
      layers: number of layers in the program; 0 if the choice of experts is an operand.
    """

    program: Callable[..., Any]
    operands: tuple[Any, ...]
    layers: int = 0


def grouped_method(shape: Shape, form: str) -> GroupedMixLora:
    """Returns MixLoRA with the top-k router, in one of the forms of `WALKS`."""
    return group_mixlora(METHODS["MixLoRA, top-k"](shape), WALKS[form])


def _method(shape: Shape, form: str) -> AdapterMethod:
    if form in WALKS:
        return grouped_method(shape, form)
    return METHODS["LoRA" if form == LORA else "MixLoRA, top-k"](shape)


def case_of(part: str, form: str, shape: Shape) -> Case:
    """Returns the program of one form of one part."""
    if part == LAYER:
        step, operands = layer_step(_method(shape, form), shape, REMAT)
        return Case(step, operands, LAYERS)
    array = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
    tokens, slots = shape.rows * shape.length, shape.top_k
    choice = array(tokens, slots, dtype=jnp.int32)
    if part == LOW_RANK:
        operands = (
            array(slots, tokens, shape.rank),
            choice,
            array(tokens, shape.width),
            array(shape.width, shape.experts, shape.rank),
        )
        return Case(forms.step_of(form, forms.activations), operands)
    operands = (
        array(slots, tokens, shape.ffn_width),
        choice,
        array(tokens, shape.ffn_width),
        array(tokens, shape.experts, shape.rank),
        array(shape.experts, shape.rank, shape.ffn_width),
    )
    return Case(forms.step_of(form, forms.expansion), operands)


def operands_of(case: Case, shape: Shape) -> tuple[Any, ...]:
    """Draws random operands, with different, equally likely experts in the slots of a token."""
    operands = random_like(case.operands)
    if case.layers:
        return operands
    cotangent, choice, *rest = operands
    scores = jax.random.normal(jax.random.key(1), (len(choice), shape.experts))
    return cotangent, jax.lax.top_k(scores, shape.top_k)[1], *rest


def measure_setting(part: str, names: Sequence[str], shape: Shape, rounds: int) -> list[Any]:
    """Measures one part at one number of experts and rank; returns a row of figures for each form.

    Args:
      part: one of `FORMS_OF_PART`.
      names: names of the forms.
      shape: sizes, with the number of experts and their rank.
      rounds: number of timed rounds; 0 to count without timing.
    """
    rows, steps = [], {}
    for form in names:
        case = case_of(part, form, shape)
        compiled = jax.jit(case.program).lower(*case.operands).compile()
        flops, memory = compiled_flops(compiled), compiled.memory_analysis()
        assert not flops.unknown_loops
        assert memory is not None
        row = {
            "part": part,
            "experts": shape.experts,
            "rank": shape.rank,
            "form": form,
            "flops": flops.total / max(1, case.layers),
            "temporary_bytes": memory.temp_size_in_bytes,
            "seconds": None,
            "ratio_to_one_hot": None,
            "error": None,
        }
        rows.append(row)
        if not rounds:
            continue
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes
        needed += memory.temp_size_in_bytes
        if needed > MOST_OF_MEMORY * _memory_bytes():
            row["error"] = f"{needed / 2**30:.0f} GiB do not fit into memory"
            continue

        def run(compiled: Any = compiled, case: Case = case) -> float:
            # Created at each call, so that only one form's operands are in memory.
            operands = jax.block_until_ready(operands_of(case, shape))
            return seconds_of(lambda: jax.block_until_ready(compiled(*operands))) / max(
                1, case.layers
            )

        steps[form] = run
    samples, failed = interleaved(steps, rounds, untimed=1)
    for row in rows:
        seconds = samples.get(row["form"])
        if not seconds or row["form"] in failed:
            row["error"] = failed.get(row["form"], row["error"])
            continue
        row["seconds"] = spread(seconds)._asdict()
        if samples.get(ONE_HOT) and ONE_HOT not in failed:
            ratios = [time / base for time, base in zip(seconds, samples[ONE_HOT], strict=True)]
            row["ratio_to_one_hot"] = spread(ratios)._asdict()
    return rows


def _memory_bytes() -> float:
    """Bytes of memory of the first device, or of the machine if that is unknown."""
    known = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return known or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def as_table(rows: Sequence[Any]) -> str:
    """Formats the figures as a table."""
    one_hot = {_setting(row): row for row in rows if row["form"] == ONE_HOT}
    lines = []
    for row in rows:
        other = one_hot.get(_setting(row))
        ratio = lambda key, row=row, other=other: (
            f"{row[key] / other[key]:.3f}" if other and other[key] else "-"
        )
        line = [row["part"], f"{row['experts']}", f"{row['rank']}", row["form"]]
        line += [f"{row['flops'] / 1e9:.4g}", ratio("flops")]
        line += [f"{row['temporary_bytes'] / MEBIBYTE:.4g}", ratio("temporary_bytes")]
        seconds, of_one_hot = row["seconds"], row["ratio_to_one_hot"]
        if seconds:
            line += [f"{seconds[key]:.4g}" for key in ("median", "lowest", "highest")]
            line.append(f"{of_one_hot['median']:.3f}" if of_one_hot else "-")
        else:
            line += ["-" if row["error"] is None else row["error"], "", "", ""]
        lines.append(line)
    headings = ["part", "experts", "rank", "form", "GFLOP", "/ one-hot", "temp. MiB", "/ one-hot"]
    return table([*headings, "seconds", "least", "most", "/ one-hot"], lines)


def _setting(row: Any) -> tuple[Any, ...]:
    return row["part"], row["experts"], row["rank"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--size", default="7b", help=SIZE_HELP)
    add("--parts", default=",".join(FORMS_OF_PART), help="parts to measure (%(default)s)")
    add("--forms", default=",".join(ALL_FORMS), help="forms to measure (%(default)s)")
    add("--experts", default="8,32,128,512", help="numbers of experts (%(default)s)")
    add("--ranks", default="8,16,32,64", help="ranks of each expert (%(default)s)")
    add("--rows", type=int, default=8, help="number of rows of the batch (8)")
    add("--length", type=int, default=128, help="number of tokens of a row (128)")
    add("--top-k", type=int, default=2, help="number of experts of a token (2)")
    add("--time", action="store_true", help="also time the programs")
    add("--rounds", type=int, default=7, help="number of timed rounds (7)")
    add("--output", type=Path, help="JSON file for the figures")
    return parser


def _numbers(flag: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{flag} {text}: must be numbers, separated by commas") from None
    if min(numbers) < 1:
        raise ConfigError(f"--{flag} {text}: must be positive")
    return list(dict.fromkeys(numbers))


def _names(flag: str, text: str, known: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(filter(None, text.split(","))))
    for name in names:
        if name not in known:
            raise ConfigError(f"--{flag}: {name!r} is none of {', '.join(known)}")
    if not names:
        raise ConfigError(f"--{flag}: names none of {', '.join(known)}")
    return names


def settings(args: argparse.Namespace) -> list[tuple[str, list[str], Shape]]:
    """Checks the flags before compiling; returns the parts, forms and shapes to measure.

    Raises:
      ConfigError: a flag is invalid.
    """
    check_output(args.output)
    model = model_of(args.size)
    check_positive(args, ("rows", "length", "top_k", "rounds"))
    parts, names = (
        _names("parts", args.parts, list(FORMS_OF_PART)),
        _names("forms", args.forms, ALL_FORMS),
    )
    experts, ranks = _numbers("experts", args.experts), _numbers("ranks", args.ranks)
    if min(experts) < max(args.top_k, 2):
        raise ConfigError(f"--experts {args.experts}: must be at least 2, and at least --top-k")
    cases = []
    for part in parts:
        part_forms = [form for form in FORMS_OF_PART[part] if form in names]
        for count in experts:
            for rank in ranks if part_forms else ():
                shape = Shape(
                    width=model.hidden_size,
                    ffn_width=model.intermediate_size,
                    heads=model.num_heads,
                    rank=rank,
                    experts=count,
                    rows=args.rows,
                    length=args.length,
                    top_k=args.top_k,
                )
                cases.append((part, part_forms, shape))
    if not cases:
        of_parts = dict.fromkeys(form for part in parts for form in FORMS_OF_PART[part])
        raise ConfigError(
            f"--forms {args.forms}: none of them is a form of --parts {args.parts}, which are "
            f"measured as {', '.join(of_parts)}"
        )
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        cases = settings(args)
        facts = machine()
        rows = []
        for part, names, shape in cases:
            say(f"{part}, {shape.experts} experts of rank {shape.rank}")
            rows += measure_setting(part, names, shape, args.rounds if args.time else 0)
        tokens = f"{args.rows} x {args.length} tokens, top-{args.top_k}"
        print(f"{args.size} in float32, {tokens}, remat {REMAT}; {one_line(facts)}")
        print(as_table(rows))
        write_json(args.output, args, benchmark="grouped", machine=facts, rows=rows)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
