"""Text of the project's own: plain sentences to pre-train on, and instructions to fine-tune on.

Everything follows from the seed. The sentences state facts (plurals, opposites, colours, sums) and
spell words; the instructions ask for those facts in a form that no sentence has, and for two skills
on letters, reversing and sorting, that no sentence shows. What an instruction of the validation
split asks about (the noun, the pair of opposites, the thing, the sum, the letters) occurs in no
instruction of the training split, in any wording.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_jax.demo.words import COLOURS, LARGEST_NUMBER, LETTERS, NAMES, OPPOSITES, PLURALS

TASKS = ("plural", "opposite", "colour", "sum", "reverse", "sort")

# Rows of the two tasks on letters; the others have as many as there are words and wordings.
LETTER_ROWS = 700
VALIDATION_SHARE = 0.15

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
    """An instruction of the kind `task`, and the one right answer to it."""

    task: str
    instruction: str
    input: str
    output: str


def plain_sentences(seed: int, count: int) -> list[str]:
    """`count` lines of two to four sentences each, for pre-training."""
    rng = random.Random(seed)
    makers: tuple[Callable[[random.Random], str], ...] = (
        _plural_sentence,
        _opposite_sentence,
        _colour_sentence,
        _sum_sentence,
        _letters_sentence,
    )
    return [
        " ".join(rng.choice(makers)(rng) for _ in range(rng.randint(2, 4))) for _ in range(count)
    ]


def instruction_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """The training and the validation split, each shuffled."""
    rng = random.Random(seed)
    train, validation = [], []
    for task, subjects in _subjects(rng).items():
        rng.shuffle(subjects)
        held_out = round(VALIDATION_SHARE * len(subjects))
        validation += [row for subject in subjects[:held_out] for row in _rows(task, subject, rng)]
        train += [row for subject in subjects[held_out:] for row in _rows(task, subject, rng)]
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def write_corpus(folder: Path, seed: int) -> None:
    """Writes `train.jsonl` and, for each task, `validation/<task>.jsonl` into `folder`."""
    train, validation = instruction_rows(seed)
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    _write_jsonl(folder / "train.jsonl", train)
    for task in TASKS:
        _write_jsonl(
            folder / "validation" / f"{task}.jsonl", [row for row in validation if row.task == task]
        )


def _write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


def _subjects(rng: random.Random) -> dict[str, list[tuple[tuple[str, str], ...]]]:
    """What each task can ask about: groups of (input, output) that belong to one split together."""
    return {
        "plural": [(item,) for item in PLURALS.items()],
        "opposite": [((a, b), (b, a)) for a, b in OPPOSITES],
        "colour": [(item,) for item in _COLOUR_OF.items()],
        "sum": [
            # 3 + 4 and 4 + 3 are one question.
            tuple({(f"{a} + {b}", str(a + b)), (f"{b} + {a}", str(a + b))})
            for a in range(LARGEST_NUMBER + 1)
            for b in range(a + 1)
        ],
        "reverse": [((" ".join(letters), " ".join(reversed(letters))),) for letters in _draws(rng)],
        "sort": [((" ".join(letters), " ".join(sorted(letters))),) for letters in _draws(rng)],
    }


def _draws(rng: random.Random) -> Iterator[tuple[str, ...]]:
    """Distinct draws of three or four distinct letters."""
    seen = set()
    while len(seen) < LETTER_ROWS:
        letters = tuple(rng.sample(LETTERS, rng.randint(3, 4)))
        if letters not in seen:
            seen.add(letters)
            yield letters


def _rows(task: str, subject: tuple[tuple[str, str], ...], rng: random.Random) -> list[Row]:
    wordings = _WORDINGS[task]
    if task in ("reverse", "sort"):  # plenty of subjects: one wording each
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


def _letters_sentence(rng: random.Random) -> str:
    start = rng.randrange(len(LETTERS) - 3)
    run = LETTERS[start : start + rng.randint(3, 6)]
    word = rng.choice(list(PLURALS))
    return rng.choice(
        (
            f"The alphabet goes {' '.join(run)}.",
            f"{word} is spelled {' '.join(word)}.",
            f"{rng.choice(NAMES)} says the letters {' '.join(rng.sample(LETTERS, 4))}.",
        )
    )
