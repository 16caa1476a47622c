"""Complete runs of preference training that take seconds, on the base of `tiny_run`."""

import json
from pathlib import Path
from typing import Any

import tiny_run

CONFIG = """
from pathlib import Path

HERE = Path(__file__).parent

TARGETS = ("q_proj", "up_proj")


def source(name):
    return dict(path=str(HERE / f"{name}.jsonl"))


def adapter(rows, held_out, preference, name="lora", **method):
    return dict(
        method=dict(name=name, rank=2, alpha=4.0, target_modules=TARGETS, **method),
        data=dict(
            train={"pairs": source(rows)},
            validation={"held_out": source(held_out)},
            max_length=24,
            cache_dir=str(HERE / "cache"),
        ),
        optimizer=dict(learning_rate=1e-2, schedule=dict(kind="constant")),
        batch_size=8,
        preference=preference,
    )


def get_config():
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32", remat="none"),
        adapters=dict(default=adapter("pairs", "held_out_pairs", dict(name="dpo", beta=0.5))),
        training=dict(steps=6, log_every=1, eval_every=2, seed=3),
        checkpoints=dict(every=3, keep=10),
    )
"""

SIDE_BY_SIDE = """

FEEDBACK = "feedback", "held_out_feedback"
PAIRS = "pairs", "held_out_pairs"
STEP = dict(reference_log_probs="step")
START = dict(name="dpo", beta=0.5, reference="start")


def with_start(adapter):
    return dict(adapter, start_from=str(HERE / "start"))


def get_config(single=get_config):
    adapters = dict(
        kto_cached=adapter(*FEEDBACK, dict(name="kto", beta=0.5)),
        kto_step=adapter(*FEEDBACK, dict(name="kto", beta=0.5, **STEP)),
        base_step=adapter(*PAIRS, dict(name="dpo", beta=0.5, **STEP)),
        start_cached=with_start(adapter(*PAIRS, START)),
        start_step=with_start(adapter(*PAIRS, dict(START, **STEP))),
    )
    training = dict(steps=40, log_every=1, eval_every=20, seed=3)
    return dict(single(), adapters=adapters, training=training)
"""
"""Further adapters, of all kinds of references; `start` is an adapter of `CONFIG`."""


def write_inputs(folder: Path) -> Path:
    """Writes everything below `folder` and returns the configuration file."""
    config = tiny_run.write_inputs(folder)
    for name, count, start in (("pairs", 20, 0), ("held_out_pairs", 5, 100)):
        write_rows(folder / f"{name}.jsonl", [pair(start + i) for i in range(count)])
    for name, count, start in (("feedback", 20, 0), ("held_out_feedback", 5, 100)):
        write_rows(folder / f"{name}.jsonl", [feedback(start + i) for i in range(count)])
    config.write_text(CONFIG)
    return config


def write_side_by_side(folder: Path) -> Path:
    """Writes a configuration of many adapters beside that of `write_inputs`, and returns it."""
    config = folder / "side_by_side.py"
    config.write_text(CONFIG + SIDE_BY_SIDE)
    return config


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(i: int) -> dict[str, Any]:
    """A short answer, which is chosen, and a long one."""
    words = [tiny_run.WORDS[(i * 7 + j * j) % len(tiny_run.WORDS)] for j in range(2 + i % 5)]
    prompt = " ".join(words) + " ->"
    return {"prompt": prompt, "chosen": " " + words[0], "rejected": " " + " ".join(words[::-1])}


def feedback(i: int) -> dict[str, Any]:
    row, is_desirable = pair(i), i % 3 != 0
    answer = row["chosen" if is_desirable else "rejected"]
    return {"prompt": row["prompt"], "completion": answer, "label": is_desirable}
