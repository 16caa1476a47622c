"""Growth of MixLoRA's cost with the number and rank of its experts, at the widths of a 7B model.

    python benchmarks/growth.py --output benchmarks/growth.md
    python benchmarks/growth.py --time

One decoder layer is compiled forward and backward without weights, as in `layer_cost.py`. Its
FLOPs, bytes moved and memory are read from the compiled program and have no noise.
`tests/benchmarks/test_growth.py` checks the tables. `--time` times such layers with random weights
instead, on an idle machine.

Forms of the experts' products, with C slots for each token:

    one-hot     `top_k` and `switch`: products with all experts' pairs at once, whose low-rank
                activations are multiplied by each slot's one-hot choice
    per expert  `top_p` and `soft`, which choose any number of experts: slot c is expert c, its
                products use only its pair, and every token has every expert's activation
    grouped     tokens sorted by expert, so that a slot's products use only its expert's pair;
                implemented in `grouped_mixlora.py`, not in the package. It needs at least the
                products of C experts that serve every token.

`growth.md` also has the seconds of `grouped.py --time`, recorded in `grouped_*.json` in the same
folder.

Needs jax and flax only.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.grouped_mixlora import group_mixlora
from benchmarks.growth_counts import (
    DEFAULT,
    EXPERTS,
    GROUPED_SETTINGS,
    LORA,
    PER_EXPERT_SETTINGS,
    RANKS,
    SHAPE,
    SHARES,
    SOFT,
    TOP_K,
    GroupedCost,
    Growth,
    PerExpert,
    compiled_experts_at,
    experts_at,
    grouped_of,
    growth_of,
    half_grouped_algebra,
    one_hot_algebra,
    per_expert_of,
)
from benchmarks.growth_seconds import HEADER as SECONDS_HEADER
from benchmarks.growth_seconds import Recorded, lines, recorded, summary
from benchmarks.layer_cost import METHODS, layer_step
from benchmarks.random_inputs import random_like
from benchmarks.report import check_output, machine, one_line, refuse, say, table
from benchmarks.timing import interleaved, seconds_of, spread
from moe_jax.errors import ConfigError, UserError

FOLDER = Path(__file__).resolve().parent
VARIED = ("experts", "rank")
TIMED = SHAPE._replace(rows=1, length=256)
MOST_TIMED_PER_EXPERT = 16
GROUPED_FORM = "MixLoRA, grouped"

GROWTH_HEADER = (
    "| experts | rank | E R | FLOPs / LoRA's, `none` | default | / frozen | / grouped | / algebra "
    "| bytes / LoRA's | memory / LoRA's, `none` | default |"
)
PER_EXPERT_HEADER = "| experts | rank | FLOPs | bytes | memory | FLOPs saved for a byte |"
GROUPED_HEADER = (
    "| experts | rank | E R | FLOPs / LoRA's | / least | one-hot's / grouped | memory / one-hot's "
    "| batched |"
)
SHARES_HEADER = "| rank |" + "".join(f" {share:.0%}: E R | compiled |" for share in SHARES)


def _table(header: str, lines: Sequence[str]) -> str:
    return "\n".join([header, "|" + " ---: |" * (header.count("|") - 1), *lines])


def growth_line(row: Growth) -> str:
    ratios = " | ".join(f"{ratio:.3f}" for ratio in row[2:])
    return f"| {row.experts} | {row.rank} | {row.experts * row.rank} | {ratios} |"


def per_expert_line(row: PerExpert) -> str:
    ratios = " | ".join(f"{ratio:.3f}" for ratio in row[2:-1])
    return f"| {row.experts} | {row.rank} | {ratios} | {row.flops_for_byte:.2f} |"


def grouped_line(row: GroupedCost) -> str:
    ratios = " | ".join(f"{ratio:.3f}" for ratio in row[2:])
    return f"| {row.experts} | {row.rank} | {row.experts * row.rank} | {ratios} |"


def shares_line(rank: int, rows: Sequence[Growth]) -> str:
    cells = []
    for share in SHARES:
        compiled = compiled_experts_at(share, [row for row in rows if row.rank == rank])
        cells.append(f"{experts_at(share, rank, one_hot_algebra) * rank:.0f}")
        cells.append("" if compiled is None else f"{compiled * rank:.0f}")
    return f"| {rank} | {' | '.join(cells)} |"


def as_markdown(
    rows: Sequence[Growth],
    per_expert: Sequence[PerExpert],
    grouped: Sequence[GroupedCost],
    runs: Sequence[Recorded],
) -> str:
    """Formats the Markdown file from the rows and the algebra."""
    fixed = ", ".join(f"{k} {v}" for k, v in SHAPE._asdict().items() if k not in VARIED)
    return _blocks(
        "# Growth of MixLoRA's cost with its experts and their rank",
        f"""Written by `python benchmarks/growth.py --output benchmarks/growth.md` and checked by a
        test. E experts of rank R, C slots for each token, widths D and F. One layer, forward and
        backward, in float32 as compiled by XLA for a CPU, all tokens in one block: {fixed}. LoRA
        has equal trainable parameters (rank E R on the FFN). `none` keeps all activations for the
        backward pass; the default is `remat` `{DEFAULT}`. Memory is the temporary bytes of two
        layers in a loop. In a deep model the kept activations of each layer have a larger share;
        they are LoRA's and the low-rank activations (`remat.md` has a whole model).""",
        *_one_hot_section(rows),
        *_per_expert_section(per_expert),
        *_grouped_section(grouped),
        *_seconds(runs),
        *_conclusions(per_expert),
    )


def _one_hot_section(rows: Sequence[Growth]) -> list[str]:
    width, slots = SHAPE.width, SHAPE.top_k
    five, ten, quarter = (experts_at(share, 16, one_hot_algebra) for share in SHARES)
    most = max(rows, key=lambda row: row.flops_none)
    limit = (width + slots * SHAPE.ffn_width) / (width + SHAPE.ffn_width)
    return [
        "## The one-hot form",
        _table(GROWTH_HEADER, [growth_line(row) for row in rows]),
        f"""With G = E R low-rank activations it computes 9 G (D + C F) multiply-adds for each
        token, and LoRA with equal parameters 9 G (D + F), see `algebra` in `layer_cost.py`: at most
        {limit:.2f} times as many for C = {slots}, and for the whole layer {most.flops_none:.2f}
        times at {most.experts} experts of rank {most.rank} ({most.flops:.2f} by default). By
        default bytes and memory grow little with G: they are those of C slots of width F.""",
        "## Break-even with the grouped form",
        """The grouped form multiplies each token with the pairs of its own experts only: 9 C R (D +
        F) multiply-adds for any number of experts. The table has the E R at which the one-hot form
        makes the layer cost 5%, 10% and 25% more than that, by the algebra and, if it lies between
        two rows above, as compiled:""",
        _table(SHARES_HEADER, [shares_line(rank, rows) for rank in RANKS]),
        f"""At rank 16 these are {five:.1f}, {ten:.1f} and {quarter:.1f} experts. The product E R
        decides; the limit is slightly higher at a higher R, which the grouped form pays for
        too.""",
    ]


def _per_expert_section(per_expert: Sequence[PerExpert]) -> list[str]:
    memory = {row.experts: row.memory for row in per_expert if row.rank == 16}
    return [
        "## The per-expert form",
        "The form of `top_p` and `soft`, over the one-hot form with `top_k`, both by default:",
        _table(PER_EXPERT_HEADER, [per_expert_line(row) for row in per_expert]),
        f"""It needs fewer FLOPs (9 D + 11 F for each of G against 9 D + 9 C F, and 2 (C - 1) F more
        if those are computed again), but E hidden activations of width F instead of C. It is faster
        on a machine that computes fewer FLOPs in the time of moving a byte than the last column.
        Memory is {memory[8]:.1f} times the one-hot form's at 8 experts and {memory[64]:.1f} times
        at 64.""",
    ]


def _grouped_section(grouped: Sequence[GroupedCost]) -> list[str]:
    of_sixteen = [row for row in grouped if row.rank == 16]
    ratios = [row.one_hot for row in grouped]
    return [
        "## The grouped form",
        """`grouped_mixlora.py` sorts the C slots of all tokens by expert into blocks of one expert
        each. It computes low-rank activations, hidden activations and the update of the down
        projection block by block with that expert's pairs, and recomputes them in the backward
        pass. No row is dropped: the number of blocks suffices for any routing, and all of them are
        computed. All figures are by default; `least` is the algebra of the grouped products (see
        the break-even above):""",
        _table(GROUPED_HEADER, [grouped_line(row) for row in grouped]),
        f"""With {of_sixteen[0].experts} experts of rank 16 the layer needs
        {of_sixteen[0].flops:.2f} times the FLOPs of LoRA with equal parameters, all of which serve
        every token, and with {of_sixteen[-1].experts} experts {of_sixteen[-1].flops:.2f} times. The
        one-hot form needs {min(ratios):.2f} to {max(ratios):.1f} times the FLOPs of the grouped
        one. `batched` is the memory if all blocks are computed at once, as suits an accelerator.
        `jax.lax.ragged_dot` is no alternative on a CPU: it compiles to products with every expert's
        matrix, with at least the one-hot form's FLOPs and many times its memory (`grouped.py`
        counts them).""",
    ]


def _conclusions(per_expert: Sequence[PerExpert]) -> list[str]:
    width = SHAPE.width
    ten, quarter = (experts_at(share, 16, one_hot_algebra) for share in SHARES[1:])
    half = [f"{experts_at(share, 16, half_grouped_algebra) * 16:.0f}" for share in SHARES]
    saved = [row.flops_for_byte for row in per_expert]
    return [
        "## Conclusions",
        f"""- Up to E R of about D / {width / (ten * 16):.0f} (here {ten * 16:.0f}: {ten:.0f}
        experts of rank 16) the one-hot form needs at most 10% more FLOPs than the grouped one, and
        sorts and moves nothing. Use it.""",
        f"""- The per-expert form is no replacement: it saves {min(saved):.1f} to {max(saved):.1f}
        FLOPs for each additional byte (in float32; twice as many in bfloat16), while a GPU computes
        hundreds in that time, and a CPU about ten. It may be faster on a CPU, where blocks of
        activations stay in a cache, with few experts of the highest rank (see `--time`). It serves
        routers that choose any number of experts, which need those activations in any case.""",
        f"""- From E R of about D / {width / (quarter * 16):.0f} ({quarter * 16:.0f}) the one-hot
        form needs 25% more, and the grouped form pays. It is implemented for measurement, not in
        the package. Grouping only the products with F, R by F, would leave 9 (E - C) R D of the
        excess, which is 5%, 10% and 25% at E R of {", ".join(half)}; it moves low-rank activations
        of rank R instead of inputs of width D. On a mesh, each device would have to group its own
        tokens.""",
        """- Beyond that, use a lower rank, or the `switch` router, whose single slot costs as much
        as LoRA with equal parameters.""",
        """FLOPs and memory are counts. `python benchmarks/growth.py --time` measures seconds of
        this layer with few tokens, on an idle machine.""",
    ]


def _seconds(runs: Sequence[Recorded]) -> list[str]:
    """Section of recorded times; empty without records."""
    if not runs:
        return []
    return [
        "## Seconds",
        """One layer of a model of that size, forward and backward, as recorded by `grouped.py
        --time` with alternating forms. Ratios are medians of the rounds, with their lowest and
        highest; sorting and moving rows is included:""",
        _table(SECONDS_HEADER, lines(runs)),
        *(f"{summary(run)} ({run.run}.)" for run in runs),
    ]


def _blocks(*blocks: str) -> str:
    """Joins Markdown blocks; wraps paragraphs and items, but not tables and headings."""
    text = ""
    for block in blocks:
        item = block.startswith("- ")
        if not block.startswith(("|", "#")):
            block = " ".join(block.split())
            block = textwrap.fill(block, 100, subsequent_indent="  " * item, break_on_hyphens=False)
        if not (item and text.rpartition("\n\n")[2].startswith("- ")):
            text += "\n" * bool(text)
        text += block + "\n"
    return text


def timed_rows(rounds: int) -> list[list[str]]:
    """Times `LAYERS` layers of few tokens alternately; returns seconds and ratios to LoRA."""
    params: Any = None
    steps: dict[str, Callable[[], float]] = {}
    for experts in EXPERTS:
        for name in (LORA, TOP_K, GROUPED_FORM, SOFT):
            if name == SOFT and experts > MOST_TIMED_PER_EXPERT:
                continue
            say(f"{name}, {experts} experts: compiling")
            shape = TIMED._replace(experts=experts)
            method = METHODS[TOP_K if name == GROUPED_FORM else name](shape)
            if name == GROUPED_FORM:
                method = group_mixlora(method)
            step, (adapters, frozen, *rest) = layer_step(method, shape, DEFAULT)
            params = random_like(frozen) if params is None else params
            compiled = jax.jit(step).lower(adapters, frozen, *rest).compile()
            arguments = (random_like(adapters), params, *random_like(rest))

            def run(call: Any = compiled, arguments: Any = arguments) -> float:
                return seconds_of(lambda: jax.block_until_ready(call(*arguments)))

            steps[f"{experts} {name}"] = run
    say(f"{rounds} rounds")
    samples, failed = interleaved(steps, rounds, untimed=1)
    lines = []
    for label, seconds in samples.items():
        if label in failed:
            lines.append([label, failed[label], "", "", ""])
            continue
        figures = list(spread(seconds))
        lora = f"{label.partition(' ')[0]} {LORA}"
        if lora not in failed:
            ratios = [time / base for time, base in zip(seconds, samples[lora], strict=True)]
            figures.append(spread(ratios).median)
        cells = [f"{figure:.4g}" for figure in figures]
        lines.append([label, *cells, *[""] * (4 - len(cells))])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--output", type=Path, help="Markdown file for the tables")
    parser.add_argument("--time", action="store_true", help="time layers instead of counting")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds (5)")
    args = parser.parse_args(argv)
    try:
        check_output(args.output)
        if args.time and args.output:
            raise ConfigError("--output: holds counts only; leave it out with --time")
        if args.rounds < 1:
            raise ConfigError("--rounds: must be positive")
    except UserError as error:
        return refuse(error)
    if args.time:
        print(f"{TIMED.rows} x {TIMED.length} tokens, float32; {one_line(machine())}")
        headings = ("experts of rank 16", "seconds", "least", "most", "/ LoRA")
        print(table(headings, timed_rows(args.rounds)))
        return 0
    rows = []
    for experts in EXPERTS:
        for rank in RANKS:
            say(f"{experts} experts of rank {rank}")
            rows.append(growth_of(experts, rank))
    per_expert = []
    for experts, rank in PER_EXPERT_SETTINGS:
        say(f"{experts} experts of rank {rank}, per expert")
        per_expert.append(per_expert_of(experts, rank))
    grouped = []
    for experts, rank in GROUPED_SETTINGS:
        say(f"{experts} experts of rank {rank}, grouped")
        grouped.append(grouped_of(experts, rank))
    text = as_markdown(rows, per_expert, grouped, recorded(FOLDER))
    print(text)
    if args.output:
        args.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
