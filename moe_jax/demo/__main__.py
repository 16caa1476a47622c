"""Trains MixLoRA on the demo's tiny Llama and shows what it has learned.

Runs offline, on any machine:

    python -m moe_jax.demo --output demo_output
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.commands.process import set_up_process
from moe_jax.demo.corpus import DEMO_CONFIG, demo_config, write_demo_data
from moe_jax.demo.score import AnswerScore, HeldOutScorer
from moe_jax.errors import UserError, report
from moe_jax.training.run.loop import train

ADAPTER = "default"


def main(arguments: list[str]) -> int:
    """Parses flags, runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.demo",
        description="Trains MixLoRA on a tiny Llama and shows what it has learned.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all files")
    parser.add_argument(
        "--config", default=DEMO_CONFIG, help="configuration (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: those of the config)")
    parser.add_argument("--only-data", action="store_true", help="write the data and stop")
    args = parser.parse_args(arguments)
    try:
        data = write_demo_data(args.output)
        if args.only_data:
            return 0
        config = demo_config(args.config, data, args.steps)
        print(f"Training with {args.config}\n")
        result = train(config, args.output / "run")
        if result.interrupted_by is not None:
            return 128 + result.interrupted_by
        scorer = HeldOutScorer(config, ADAPTER)
        before, after = scorer(None), scorer(load_adapter(result.adapters[ADAPTER]))
    except UserError as error:
        return report(error)
    print("\n".join(["", *score_table(before, after), "", *load_table(after), ""]))
    pictures = sorted((args.output / "run").glob("*.png"))
    print(f"adapter   {result.adapters[ADAPTER]}")
    print(f"pictures  {', '.join(str(picture) for picture in pictures)}")
    print(f"metrics   {args.output / 'run' / 'metrics.jsonl'}")
    print("next      make compare: MixLoRA and LoRA of the same size, three seeds each")
    print("          your own checkpoint and data: docs/guide/own_data.md")
    return 0


def score_table(before: dict[str, AnswerScore], after: dict[str, AnswerScore]) -> list[str]:
    """Lines that compare the scores of each task."""
    lines = [
        "Held-out questions: share answered exactly right, and loss per answer token",
        "",
        f"{'task':10}{'questions':>10}   {'frozen base':^16}   {'with adapter':^16}".rstrip(),
    ]
    for task, base in before.items():
        adapted = after[task]
        lines.append(
            f"{task:10}{base.questions:10d}   {base.exact:8.0%}{base.loss:8.3f}"
            f"   {adapted.exact:8.0%}{adapted.loss:8.3f}"
        )
    return lines


def load_table(scores: dict[str, AnswerScore]) -> list[str]:
    """Lines with the experts' loads on each task, in the layer where tasks differ most."""
    loads_by_task = {task: score.load for task, score in scores.items() if score.load is not None}
    if not loads_by_task:
        return []
    loads = np.stack(list(loads_by_task.values()))  # [task, L, E]
    layer = int(np.argmax(np.var(loads, axis=0).sum(axis=-1)))
    experts = loads.shape[-1]
    lines = [
        f"Share of the tokens of each expert (equal: {1 / experts:.0%}), in layer {layer},",
        "where the tasks differ most",
        "",
        f"{'task':10}" + "".join(f"{f'expert {index}':>10}" for index in range(experts)),
    ]
    for task, shares in zip(loads_by_task, loads[:, layer], strict=True):
        lines.append(f"{task:10}" + "".join(f"{share:10.0%}" for share in shares))
    return lines


if __name__ == "__main__":
    set_up_process()
    sys.exit(main(sys.argv[1:]))
