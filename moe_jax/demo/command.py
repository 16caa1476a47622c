"""`moe-jax demo`: trains MixLoRA on the demo's tiny Llama and shows what it has learned."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.commands import Run

if TYPE_CHECKING:  # jax is imported when the command runs, not for --help
    from moe_jax.demo.score import AnswerScore

ADAPTER = "default"


def add(parser: argparse.ArgumentParser) -> Run:
    """Train MixLoRA on a tiny Llama that comes with the package, offline."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for all files (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="configuration (default: OUTPUT/tiny_mixlora.py, which is written if it is missing)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="training steps (default: those of the config)"
    )
    parser.add_argument(
        "--only-data", action="store_true", help="write data and configuration, and stop"
    )
    return _run


def _run(arguments: argparse.Namespace) -> int:
    from moe_jax.checkpoints.adapter_files import load_adapter
    from moe_jax.demo.corpus import demo_config, write_demo_config, write_demo_data
    from moe_jax.demo.score import HeldOutScorer
    from moe_jax.training.run.loop import train

    output: Path = arguments.output
    data, file = write_demo_data(output), write_demo_config(output)
    if arguments.only_data:
        print(f"wrote {data} and {file}; train with: moe-jax train --config {file}")
        return 0
    file = arguments.config or str(file)
    config = demo_config(file, data, arguments.steps)
    print(f"Training with {file}\n")
    result = train(config, output / "run")
    if result.interrupted_by is not None:
        return 128 + result.interrupted_by
    scorer = HeldOutScorer(config, ADAPTER)
    before, after = scorer(None), scorer(load_adapter(result.adapters[ADAPTER]))
    print("\n".join(["", *score_table(before, after), "", *load_table(after), ""]))
    pictures = sorted((output / "run").glob("*.png"))
    print(f"adapter   {result.adapters[ADAPTER]}")
    print(f"pictures  {', '.join(str(picture) for picture in pictures)}")
    print(f"metrics   {output / 'run' / 'metrics.jsonl'}")
    print(
        "next      your own checkpoint and data: moe-jax train --base DIR_OR_ID --data FILE_OR_ID"
    )
    print("          in a clone, make compare: MixLoRA and LoRA of the same size, three seeds each")
    return 0


def score_table(before: "dict[str, AnswerScore]", after: "dict[str, AnswerScore]") -> list[str]:
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


def load_table(scores: "dict[str, AnswerScore]") -> list[str]:
    """Lines with the experts' loads on each task, in the layer where tasks differ most."""
    import numpy as np

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
