"""The demo's instructions as tasks of one's own: each question with four answers to choose from."""

import json
import random
from pathlib import Path

from moe_jax.demo.corpus import TASKS, Row, instruction_rows
from moe_jax.tasks.families.template import TEMPLATE_FILE

CHOICES = 4

TEMPLATE = "{instruction}\n{input}\nAnswer:\n"
"""Left out are the choices, which the model is not shown, and where the answer stands: `answer`."""


def write_tasks(folder: Path, seed: int) -> None:
    """Writes a folder for each task: `train.jsonl`, `test.jsonl` and `template.txt`.

    They ask what `corpus.write_corpus` writes with the same seed, its validation rows as `test`.
    """
    rng = random.Random(seed)
    for split, rows in zip(("train", "test"), instruction_rows(seed), strict=True):
        for task in TASKS:
            own = [row for row in rows if row.task == task]
            outputs = sorted({row.output for row in own})
            lines = [json.dumps(_with_choices(row, outputs, rng)) + "\n" for row in own]
            (folder / task).mkdir(parents=True, exist_ok=True)
            (folder / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            (folder / task / TEMPLATE_FILE).write_text(TEMPLATE, encoding="utf-8")


def _with_choices(row: Row, outputs: list[str], rng: random.Random) -> dict[str, object]:
    """A row with the right answer somewhere among wrong ones."""
    if row.task in ("reverse", "sort"):  # the same letters in another order
        letters = row.output.split()
        others = {" ".join(rng.sample(letters, len(letters))) for _ in range(10 * CHOICES)}
    else:
        others = set(rng.sample(outputs, min(CHOICES, len(outputs))))
    choices = sorted(others - {row.output})
    choices = rng.sample(choices, min(CHOICES - 1, len(choices)))
    choices.insert(rng.randint(0, len(choices)), row.output)
    return {
        "instruction": row.instruction,
        "input": row.input,
        "choices": choices,
        "answer": choices.index(row.output),
    }
