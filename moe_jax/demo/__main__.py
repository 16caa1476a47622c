"""Trains MixLoRA on the demo's tiny Llama, shows what it learned, and compares it with LoRA.

Offline, on any machine:

    python -m moe_jax.demo --output demo_output
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.commands.process import set_up_process
from moe_jax.config.command_line import load_config_file
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.demo.compare import examine
from moe_jax.demo.corpus import write_corpus, write_tasks
from moe_jax.demo.score import Examiner, Score
from moe_jax.errors import UserError, report
from moe_jax.training.run.loop import train

DATA_SEED = 0
ADAPTER = "default"
COMPARISON = "configs/tiny_comparison.py"
DATA = Path("demo_output/data")
"""Where the configurations say that the data lies."""


def main(arguments: list[str]) -> int:
    """Parses flags, runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.demo",
        description="Trains MixLoRA on a tiny Llama, and compares it.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--config", default="configs/tiny_mixlora.py", help="the run")
    parser.add_argument("--steps", type=int, help="instead of the config's config.training.steps")
    parser.add_argument(
        "--comparison-steps", type=int, help=f"instead of those of {COMPARISON}; 0 leaves it out"
    )
    parser.add_argument("--only-data", action="store_true", help="write the data and stop")
    args = parser.parse_args(arguments)
    try:
        write_corpus(args.output / "data", DATA_SEED)
        write_tasks(args.output / "data" / "tasks", DATA_SEED)
        if args.only_data:
            return 0
        config = read_config(args.config, args.output / "data", args.steps)
        print(f"Training with {args.config}\n")
        result = train(config, args.output / "run")
        if result.interrupted_by is not None:
            return 128 + result.interrupted_by
        ask = Examiner(config, ADAPTER)
        before, after = ask(None), ask(load_adapter(result.adapters[ADAPTER]))
        print("\n".join(["", *score_table(before, after), "", *load_table(after), ""]))
        if args.comparison_steps != 0:
            status = compare(args.output, args.comparison_steps, ask)
            if status:
                return status
    except UserError as error:
        return report(error)
    pictures = sorted((args.output / "run").glob("*.png"))
    print(f"adapter   {result.adapters[ADAPTER]}")
    print(f"pictures  {', '.join(str(picture) for picture in pictures)}")
    print(f"metrics   {args.output / 'run' / 'metrics.jsonl'}")
    print("next      your own checkpoint and data: README.md, 'Train on your own data'")
    return 0


def read_config(file: str, data: Path, steps: int | None) -> RunConfig:
    """The configuration in `file`, with what it takes from `DATA` taken from the folder `data`."""
    raw = load_config_file(file)
    for adapter in raw["adapters"].values():
        for split in ("train", "validation"):
            for source in adapter["data"][split].values():
                if Path(source["path"]).is_relative_to(DATA):
                    source["path"] = str(data / Path(source["path"]).relative_to(DATA))
    if steps is not None:
        raw["training"]["steps"] = steps
    return parse_run_config(raw, METHODS)


def compare(output: Path, steps: int | None, ask: Examiner) -> int:
    """Trains the adapters of `COMPARISON`, shows how they answer, and returns the exit status."""
    config = read_config(COMPARISON, output / "data", steps)
    print(f"Comparing with {COMPARISON}\n")
    result = train(config, output / "comparison")
    if result.interrupted_by is not None:
        return 128 + result.interrupted_by
    found = examine(config, result.adapters, ask)
    file = output / "comparison.json"
    found.write(file)
    print("\n".join(["", *found.lines(), "", f"figures   {file}"]))
    return 0


def score_table(before: dict[str, Score], after: dict[str, Score]) -> list[str]:
    """Lines that compare the scores of each task."""
    lines = [
        "Questions that training never asked: answered exactly right, and loss per answer token",
        "",
        f"{'task':10}{'questions':>10}   {'frozen base':^16}   {'with adapter':^16}".rstrip(),
    ]
    for task, old in before.items():
        new = after[task]
        lines.append(
            f"{task:10}{old.questions:10d}   {old.exact:8.0%}{old.loss:8.3f}"
            f"   {new.exact:8.0%}{new.loss:8.3f}"
        )
    return lines


def load_table(scores: dict[str, Score]) -> list[str]:
    """Lines that say how each task's tokens spread over the experts, where tasks differ most."""
    shares = {task: result.load for task, result in scores.items() if result.load is not None}
    if not shares:
        return []
    loads = np.stack(list(shares.values()))  # [task, L, E]
    layer = int(np.argmax(np.var(loads, axis=0).sum(axis=-1)))
    experts = loads.shape[-1]
    lines = [
        f"Share of the tokens that each expert took (equal: {1 / experts:.0%}), in layer {layer},",
        "the one where the tasks differ most",
        "",
        f"{'task':10}" + "".join(f"{f'expert {index}':>10}" for index in range(experts)),
    ]
    for task, share in zip(shares, loads[:, layer], strict=True):
        lines.append(f"{task:10}" + "".join(f"{part:10.0%}" for part in share))
    return lines


if __name__ == "__main__":
    set_up_process()
    sys.exit(main(sys.argv[1:]))
