"""Questions whose options are listed under letters."""

import string
from collections.abc import Sequence

from moe_jax.errors import DataError
from moe_jax.tasks.rows import Row
from moe_jax.tasks.task import Choice, Question

LETTERS = tuple(string.ascii_uppercase)


def lettered(texts: Sequence[str]) -> str:
    """The options, one a line: `(A) first`."""
    return "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False))


def lettered_question(
    row: Row,
    *,
    preface: str,
    stem: str,
    texts: Sequence[str],
    answer: int,
    subject: str = "",
    choices: tuple[Choice, ...] | None = None,
) -> Question:
    """A question that is answered by the letter of an option, or by the option's own words.

    Letters go by the options' order, whatever the data set itself calls them: some rows of ARC
    number theirs, and a digit is two tokens in Llama's tokenizer where a letter is one.

    Args:
      row: where the question comes from.
      preface: the instruction.
      stem: the question, the line before the options.
      texts: the options.
      answer: the index of the right one.
      subject: see `Question`.
      choices: what is scored by likelihood; by default each option after `stem` and `Answer:`.
    """
    if len(texts) > len(LETTERS):
        raise DataError(f"{row.where}: {len(texts)} options, of at most {len(LETTERS)}")
    if choices is None:
        choices = tuple(Choice(f"{stem}\nAnswer:", f" {text}") for text in texts)
    prompt = f"{stem}\n{lettered(texts)}\nAnswer:"
    labels = LETTERS[: len(texts)]
    return Question(row.where, preface, prompt, labels, choices, answer, subject)


def labelled_choices(row: Row) -> tuple[tuple[str, ...], int]:
    """Texts and right index of a row with `choices` (`text`, `label`) and `answerKey`."""
    choices = row.group("choices")
    texts = choices.texts("text")
    labels = choices.texts("label", len(texts))
    if len(set(labels)) < len(labels):
        raise DataError(f"{choices.where}: column 'label' holds a label twice: {', '.join(labels)}")
    return texts, row.position("answerKey", labels)
