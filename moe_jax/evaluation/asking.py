"""Tasks as token ids, checked against the base's vocabulary and context."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from moe_jax.data.tokenizer import leading_tokens
from moe_jax.errors import ConfigError, DataError
from moe_jax.evaluation.items import Item
from moe_jax.evaluation.protocols import PROTOCOLS, Prepared
from moe_jax.tasks.task import Question


class Limits(NamedTuple):
    """What the base can take.

    Attributes:
      vocab_size: how many ids it knows.
      context: how many tokens it was made for.
      truncate: whether what is longer loses tokens at its start, or is refused.
    """

    vocab_size: int
    context: int
    truncate: bool


class Asked(NamedTuple):
    """A task asked in one way.

    Attributes:
      task: the task's name.
      protocol: see `protocols`.
      prepared: its questions as token ids.
      cut: how many of them lost tokens at their start.
    """

    task: str
    protocol: str
    prepared: list[Prepared]
    cut: int

    @property
    def groups(self) -> list[tuple[Item, ...]]:
        """The items of each question."""
        return [one.items for one in self.prepared]


def ask(
    questions: Mapping[str, Sequence[Question]],
    protocols: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> list[Asked]:
    """Each task in each way in which it can be asked.

    Args:
      questions: by task.
      protocols: names of `PROTOCOLS`.
      tokenizer: the base's own.
      limits: the base's.

    Raises:
      ConfigError: a task cannot be asked in any of the ways.
      DataError: the tokenizer does not tell labels apart or does not fit the base, or a question is
        longer than the base's context.
    """
    lead = len(leading_tokens(tokenizer))
    asked = []
    for task, own in questions.items():
        before = len(asked)
        for protocol in protocols:
            prepared = PROTOCOLS[protocol].prepare(task, own, tokenizer)
            if prepared:
                _check_vocabulary(prepared, tokenizer, limits.vocab_size)
                asked.append(_fitted(task, protocol, prepared, lead, limits))
        if len(asked) == before:
            raise ConfigError(f"task {task!r}: has no labels; take the protocol 'choices'")
    return asked


def most_candidates(asked: Sequence[Asked]) -> int:
    """Of an item, at most."""
    counts = (len(item.candidates) for one in asked for items in one.groups for item in items)
    return max(counts, default=1)


def _check_vocabulary(
    prepared: Sequence[Prepared], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> None:
    largest = max(
        token
        for one in prepared
        for item in one.items
        for token in (*item.tokens, *item.targets, *item.candidates)
    )
    if largest >= vocab_size:
        raise DataError(
            f"{tokenizer.name_or_path}: the tokenizer gives the id {largest}, but the base has "
            f"embeddings for 0 to {vocab_size - 1}; take that base's own tokenizer"
        )


def _fitted(
    task: str, protocol: str, prepared: Sequence[Prepared], lead: int, limits: Limits
) -> Asked:
    fitted, cut = [], 0
    for question, items in prepared:
        longest = max(len(item.tokens) for item in items)
        if longest > limits.context:
            problem = (
                f"task {task!r}: {question.where}: {longest} tokens (protocol {protocol!r}), and "
                f"the base's context has {limits.context}"
            )
            if not limits.truncate:
                raise DataError(f"{problem}; take fewer shots, or --truncate to cut its start off")
            try:
                items = tuple(item.shortened(limits.context, lead) for item in items)
            except ValueError:
                raise DataError(f"{problem}; the choices alone are too long") from None
            cut += 1
        fitted.append(Prepared(question, items))
    return Asked(task, protocol, fitted, cut)
