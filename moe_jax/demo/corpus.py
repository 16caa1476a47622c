"""Data of the demo: plain sentences to pre-train on, instructions to fine-tune on, and tasks.

All data is a function of a seed. The sentences state facts (plurals, opposites, colours, sums) and
show letters that are reversed and sorted. The instructions ask for the same facts in a form that
does not occur in the sentences, and expect the answer alone. The subject of a validation
instruction (noun, pair of opposites, thing, sum, or letters) occurs in no training instruction, and
its letters occur in no sentence.
"""

import json
import random
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_jax.adapters import METHODS
from moe_jax.config.command_line import load_config_file
from moe_jax.config.run import RunConfig, parse_run_config
from moe_jax.demo.words import COLOURS, LARGEST_NUMBER, LETTERS, NAMES, OPPOSITES, PLURALS
from moe_jax.tasks.families.template import TEMPLATE_FILE

DATA_SEED = 0
_CONFIG = Path(__file__).with_name("tiny_mixlora.py")
_CONFIG_DATA = Path("demo_output/data")
"""Data folder in the paths of the demo's configurations."""

TASKS = ("plural", "opposite", "colour", "sum", "reverse", "sort")

# Rows of each of the two tasks on letters; the others have a row for each word and wording.
LETTER_ROWS = 500
HELD_OUT_LETTER_ROWS = 60
HELD_OUT_SHARE = 0.15

# Questions with answers, ((input, output), ...), that must be in the same split.
Subject = tuple[tuple[str, str], ...]

_COLOUR_OF = {thing: colour for colour, things in COLOURS.items() for thing in things}
_OPPOSITE_OF = {**dict(OPPOSITES), **{b: a for a, b in OPPOSITES}}

_WORDINGS = {
    "plural": ("Write the plural.", "What are two of these called?"),
    "opposite": ("Write the opposite.", "What is the opposite of this word?"),
    "colour": ("What colour is this?", "Name the colour of this."),
    "sum": ("Add these.", "How much is this?"),
    "reverse": ("Reverse the letters.", "Write the letters backwards."),
    "sort": ("Sort the letters.", "Write the letters in order."),
}


@dataclass(frozen=True)
class Row:
    """An instruction of a task with its single right answer."""

    task: str
    instruction: str
    input: str
    output: str


def plain_sentences(seed: int, count: int) -> list[str]:
    """Lines of two to four sentences each, for pre-training."""
    rng = random.Random(seed)
    makers = _sentence_makers()
    return [
        " ".join(rng.choice(makers)(rng) for _ in range(rng.randint(2, 4))) for _ in range(count)
    ]


def preference_rows(seed: int, count: int) -> list[dict[str, str]]:
    """Pairs of continuations of a sentence: chosen on an opposite, and rejected on another fact."""
    rng = random.Random(seed)
    makers = [maker for maker in _sentence_makers() if maker is not _opposite_sentence]
    return [
        {
            "prompt": rng.choice(makers)(rng),
            "chosen": " " + _opposite_sentence(rng),
            "rejected": " " + rng.choice(makers)(rng),
        }
        for _ in range(count)
    ]


def _sentence_makers() -> tuple[Callable[[random.Random], str], ...]:
    return (
        _plural_sentence,
        _opposite_sentence,
        _colour_sentence,
        _sum_sentence,
        _spelling_sentence,
        _reverse_sentence,
        _sort_sentence,
    )


def instruction_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """The training and the validation split, each shuffled."""
    rng = random.Random(seed)
    train, validation = [], []
    for task in TASKS:
        for subjects, split in zip(_split_subjects(task, rng), (train, validation), strict=True):
            split += [row for subject in subjects for row in _rows(task, subject, rng)]
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def write_corpus(folder: Path, seed: int) -> None:
    """Writes `train.jsonl` and, for each task, `validation/TASK.jsonl`."""
    train, validation = instruction_rows(seed)
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    _write_jsonl(folder / "train.jsonl", train)
    for task in TASKS:
        _write_jsonl(
            folder / "validation" / f"{task}.jsonl", [row for row in validation if row.task == task]
        )


def _write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def _split_subjects(task: str, rng: random.Random) -> tuple[list[Subject], list[Subject]]:
    """Subjects of the training and of the validation split."""
    if task in ("reverse", "sort"):
        change = reversed if task == "reverse" else sorted
        subjects = {
            held_out: [
                ((" ".join(letters), " ".join(change(letters))),)
                for letters in _distinct_draws(rng, held_out, count)
            ]
            for held_out, count in ((False, LETTER_ROWS), (True, HELD_OUT_LETTER_ROWS))
        }
        return subjects[False], subjects[True]
    subjects = _facts()[task]
    rng.shuffle(subjects)
    held_out = round(HELD_OUT_SHARE * len(subjects))
    return subjects[held_out:], subjects[:held_out]


def _facts() -> dict[str, list[Subject]]:
    return {
        "plural": [(item,) for item in PLURALS.items()],
        "opposite": [((a, b), (b, a)) for a, b in OPPOSITES],
        "colour": [(item,) for item in _COLOUR_OF.items()],
        "sum": [
            # 3 + 4 and 4 + 3 are in the same split.
            tuple({(f"{a} + {b}", str(a + b)), (f"{b} + {a}", str(a + b))})
            for a in range(LARGEST_NUMBER + 1)
            for b in range(a + 1)
        ],
    }


def _draw(rng: random.Random, held_out: bool) -> tuple[str, ...]:
    """Three or four distinct letters; a fifth of all choices is held out for validation."""
    while True:
        letters = tuple(rng.sample(LETTERS, rng.randint(3, 4)))
        if (sum(map(LETTERS.index, letters)) % 5 == 0) == held_out:
            return letters


def _distinct_draws(rng: random.Random, held_out: bool, count: int) -> list[tuple[str, ...]]:
    seen: dict[tuple[str, ...], None] = {}
    while len(seen) < count:
        seen[_draw(rng, held_out)] = None
    return list(seen)


def _rows(task: str, subject: Subject, rng: random.Random) -> list[Row]:
    wordings = _WORDINGS[task]
    if task in ("reverse", "sort"):  # one wording for each of many subjects
        wordings = (rng.choice(wordings),)
    return [
        Row(task=task, instruction=wording, input=question, output=answer)
        for wording in wordings
        for question, answer in sorted(subject)
    ]


def _plural_sentence(rng: random.Random) -> str:
    noun, plural = rng.choice(list(PLURALS.items()))
    name = rng.choice(NAMES)
    number = rng.randint(2, LARGEST_NUMBER)
    return rng.choice(
        (
            f"{name} has one {noun} and {number} {plural}.",
            f"The plural of {noun} is {plural}.",
            f"First {name} saw a {noun}, then many {plural}.",
            f"There are two {plural} here, and {name} has the third {noun}.",
        )
    )


def _opposite_sentence(rng: random.Random) -> str:
    word, opposite = rng.choice(list(_OPPOSITE_OF.items()))
    name = rng.choice(NAMES)
    return rng.choice(
        (
            f"The opposite of {word} is {opposite}.",
            f"Not {word}, said {name}, but {opposite}.",
            f"{name} says {word} when it is {opposite}.",
        )
    )


def _colour_sentence(rng: random.Random) -> str:
    thing, colour = rng.choice(list(_COLOUR_OF.items()))
    name = rng.choice(NAMES)
    return rng.choice(
        (
            f"The colour of {thing} is {colour}.",
            f"{name} looks at {thing} and sees {colour}.",
            f"It is as {colour} as {thing}.",
        )
    )


def _sum_sentence(rng: random.Random) -> str:
    a, b = rng.randint(0, LARGEST_NUMBER), rng.randint(0, LARGEST_NUMBER)
    name = rng.choice(NAMES)
    plural = rng.choice(list(PLURALS.values()))
    return rng.choice(
        (
            f"{a} + {b} is {a + b}.",
            f"{name} adds {a} + {b} and gets {a + b}.",
            f"{name} had {a} {plural}, found {b} more, and now has {a + b}.",
        )
    )


def _spelling_sentence(rng: random.Random) -> str:
    start = rng.randrange(len(LETTERS) - 3)
    run = LETTERS[start : start + rng.randint(3, 6)]
    word = rng.choice(list(PLURALS))
    return rng.choice(
        (f"The alphabet goes {' '.join(run)}.", f"{word} is spelled {' '.join(word)}.")
    )


def _reverse_sentence(rng: random.Random) -> str:
    letters = _draw(rng, held_out=False)
    spelled, back = " ".join(letters), " ".join(reversed(letters))
    name = rng.choice(NAMES)
    return rng.choice(
        (f"Backwards {spelled} is {back}.", f"{name} turns {spelled} round into {back}.")
    )


def _sort_sentence(rng: random.Random) -> str:
    letters = _draw(rng, held_out=False)
    spelled, ordered = " ".join(letters), " ".join(sorted(letters))
    name = rng.choice(NAMES)
    return rng.choice(
        (f"In order {spelled} is {ordered}.", f"{name} puts {spelled} in line: {ordered}.")
    )


CHOICES = 4

TEMPLATE = "{instruction}\n{input}\nAnswer:\n"
"""Prompt of the tasks. The choices are not shown, and the right one is in the column `answer`."""


def write_tasks(folder: Path, seed: int) -> None:
    """Writes the instructions as tasks with four choices each.

    Each task is a folder with `train.jsonl`, `test.jsonl` (the validation rows of `write_corpus`)
    and `template.txt`.
    """
    rng = random.Random(seed)
    for split, rows in zip(("train", "test"), instruction_rows(seed), strict=True):
        for task in TASKS:
            task_rows = [row for row in rows if row.task == task]
            outputs = sorted({row.output for row in task_rows})
            lines = [json.dumps(_with_choices(row, outputs, rng)) + "\n" for row in task_rows]
            (folder / task).mkdir(parents=True, exist_ok=True)
            (folder / task / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            (folder / task / TEMPLATE_FILE).write_text(TEMPLATE, encoding="utf-8")


def _with_choices(row: Row, outputs: list[str], rng: random.Random) -> dict[str, object]:
    """A row with the right answer at a random index among wrong ones."""
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


def write_demo_data(output: Path) -> Path:
    """Writes corpus, tasks and preferences of the demo into `output/data`; returns that folder."""
    write_corpus(output / "data", DATA_SEED)
    write_tasks(output / "data" / "tasks", DATA_SEED)
    folder = output / "data" / "preferences"
    folder.mkdir(exist_ok=True)
    for split, count, seed in (("train", 400, DATA_SEED), ("held_out", 40, DATA_SEED + 1)):
        rows = preference_rows(seed, count)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return output / "data"


def write_demo_config(output: Path) -> Path:
    """Writes a copy of `tiny_mixlora.py` that reads `output/data`, if there is none; its path."""
    file = output / _CONFIG.name
    if not file.exists():
        values = {f'"{_CONFIG_DATA}"': json.dumps(str(output / "data"))}
        written = re.sub(
            f'"{_CONFIG_DATA}"|{_CONFIG_DATA.parent}',
            lambda match: values.get(match[0], shlex.quote(str(output))),
            _CONFIG.read_text(encoding="utf-8"),
        )
        file.write_text(written, encoding="utf-8")
    return file


def demo_config(file: str | Path, data: Path, steps: int | None = None) -> RunConfig:
    """Configuration in `file`, with the demo's data read from the folder `data`.

    Raises:
      ConfigError: the file does not exist or is invalid.
    """
    raw = load_config_file(str(file))
    for adapter in raw["adapters"].values():
        for split in ("train", "validation"):
            for source in adapter["data"][split].values():
                if Path(source["path"]).is_relative_to(_CONFIG_DATA):
                    source["path"] = str(data / Path(source["path"]).relative_to(_CONFIG_DATA))
    if steps is not None:
        raw["training"]["steps"] = steps
    return parse_run_config(raw, METHODS)
