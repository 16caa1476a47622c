"""Trains MixLoRA on the demo's tiny Llama and shows what it learned; offline, on any machine.

python -m moe_jax.demo --output demo_output
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.adapters.segments import Segment
from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.checkpoints.base import load_base
from moe_jax.checkpoints.hf_config import read_model_config
from moe_jax.config.command_line import load_config_file
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.data.pipeline import load_validation_data
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.demo.corpus import write_corpus
from moe_jax.demo.score import Score, score
from moe_jax.errors import UserError, report
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.loop import train

DATA_SEED = 0
ADAPTER = "default"


def main(arguments: list[str]) -> int:
    """Parses flags, runs the demo and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_jax.demo", description="Trains MixLoRA on a tiny Llama."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--config", default="configs/tiny_mixlora.py", help="the run")
    parser.add_argument("--steps", type=int, help="instead of the config's config.training.steps")
    parser.add_argument("--only-data", action="store_true", help="write the data and stop")
    args = parser.parse_args(arguments)
    try:
        write_corpus(args.output / "data", DATA_SEED)
        if args.only_data:
            return 0
        config = read_config(args.config, args.output / "data", args.steps)
        print(f"Training with {args.config}\n")
        result = train(config, args.output / "run")
        if result.interrupted_by is not None:
            return 128 + result.interrupted_by
        before, after = compare(config, result.adapters[ADAPTER])
    except UserError as error:
        return report(error)
    print("\n".join(["", *score_table(before, after), "", *load_table(after), ""]))
    pictures = sorted((args.output / "run").glob("*.png"))
    print(f"adapter   {result.adapters[ADAPTER]}")
    print(f"pictures  {', '.join(str(picture) for picture in pictures)}")
    print(f"metrics   {args.output / 'run' / 'metrics.jsonl'}")
    print("next      your own checkpoint and data: README.md, 'Train on your own data'")
    return 0


def read_config(file: str, data: Path, steps: int | None) -> RunConfig:
    """The configuration in `file`, with its data sets taken from the folder `data`."""
    raw = load_config_file(file)
    splits = raw["adapters"][ADAPTER]["data"]
    for source in splits["train"].values():
        source["path"] = str(data / "train.jsonl")
    for task, source in splits["validation"].items():
        source["path"] = str(data / "validation" / f"{task}.jsonl")
    if steps is not None:
        raw["training"]["steps"] = steps
    return parse_run_config(raw, METHODS)


def compare(config: RunConfig, folder: Path) -> tuple[dict[str, Score], dict[str, Score]]:
    """Scores of the frozen base and of the saved adapter on each validation set."""
    base = Path(config.base.path)
    model_config = read_model_config(base)
    params = load_base(base, model_config, config.base.param_dtype)
    own = config.adapters[ADAPTER]
    sets = load_validation_data(own.data, load_tokenizer(base), own.batch_size)
    saved = load_adapter(folder)
    frozen = LlamaForCausalLM(model_config, config.compute, param_dtype=config.base.param_dtype)
    adapted = frozen.clone(segments=(Segment(ADAPTER, saved.method, 0, own.batch_size),))

    def scores(model: LlamaForCausalLM, adapters: dict[str, Any]) -> dict[str, Score]:
        return {task: score(model, params, adapters, batches) for task, batches in sets.items()}

    return scores(frozen, {}), scores(adapted, {ADAPTER: saved.tree})


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
    sys.exit(main(sys.argv[1:]))
