"""From questions to token ids: the two ways in which a model's answer is read off.

`labels`: the prompt lists the options, and the answer is the label (`A`, `true`) that the model
finds likeliest next. Where each label is one token, this compares the logits of these tokens at the
prompt's last position, as the reference does (MoE-PEFT, `evaluator.py`). What all labels begin with
(a token of a space) counts as the prompt's end; labels of several tokens are compared by the
likelihood of the whole label, which for one token is the same.

`choices`: the prompt does not list the options, and the answer is the option whose words are
likeliest after it. `acc` goes by the sum of their tokens' log-probabilities, `acc_norm` by that sum
divided by the number of characters (arXiv:2005.14165, section 2.4, divides by tokens; characters,
as in lm-evaluation-harness, compare between tokenizers).

Texts become ids as they do in training: see `moe_jax.data.tokenised_source`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.data.encoding import Example, Piece
from moe_jax.data.tokenised_source import encode_examples
from moe_jax.data.tokenizer import encode, leading_tokens
from moe_jax.errors import ConfigError, DataError
from moe_jax.evaluation.scorer import ScoredSequence
from moe_jax.tasks.task import Question

Measures = dict[str, int]
"""By the name of a measure, the index of the choice that it picks."""


class PreparedQuestion(NamedTuple):
    """A question as token ids.

    Attributes:
      question: as text.
      items: what the model has to score; their scores one after the other are the choices'.
    """

    question: Question
    items: tuple[ScoredSequence, ...]


class ScoringProtocol(NamedTuple):
    """A way of asking.

    Attributes:
      prepare: from `(task name, questions, tokenizer)` to the prepared questions; none at all where
        the task cannot be asked that way.
      measures: the names of what is measured.
      pick: from a question and its choices' scores to what each measure picks.
    """

    prepare: Callable[[str, Sequence[Question], PreTrainedTokenizerBase], list[PreparedQuestion]]
    measures: tuple[str, ...]
    pick: Callable[[Question, Sequence[float]], Measures]


def prepare_labels(
    task: str, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> list[PreparedQuestion]:
    """See `ScoringProtocol`.

    Raises:
      DataError: the tokenizer does not tell the labels apart.
    """
    if not all(question.labels for question in questions):
        return []
    prompts = [question.whole_prompt for question in questions]
    lead = leading_tokens(tokenizer)
    encoded = encode(tokenizer, prompts)
    # What labels become depends on the end of the prompt only: its last line.
    known: dict[tuple[str, tuple[str, ...]], list[list[int]]] = {}
    prepared = []
    for question, prompt, ids in zip(questions, prompts, encoded, strict=True):
        key = (prompt.rsplit("\n", 1)[-1], question.labels)
        if key not in known:
            known[key] = _label_ids(task, question, tokenizer)
        tokens = [*lead, *ids]
        prepared.append(PreparedQuestion(question, _label_items(tokens, known[key])))
    return prepared


def _label_items(prompt: list[int], labels: list[list[int]]) -> tuple[ScoredSequence, ...]:
    shared = _shared_prefix(labels)
    rest = [label[shared:] for label in labels]
    if all(len(ids) == 1 for ids in rest):
        return (
            ScoredSequence.next_token([*prompt, *labels[0][:shared]], [ids[0] for ids in rest]),
        )
    context = [*prompt, *labels[0][:shared]]
    return tuple(ScoredSequence.continuation(context, ids) for ids in rest)


def _label_ids(
    task: str, question: Question, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    labels, prompt = question.labels, question.whole_prompt
    pairs = encode_pairs(tokenizer, [(prompt, text) for text in question.label_texts])
    ids = [continuation for _, continuation in pairs]
    name = tokenizer.name_or_path or "the tokenizer"
    for index, (label, own) in enumerate(zip(labels, ids, strict=True)):
        if not own or tokenizer.unk_token_id in own:
            raise DataError(
                f"task {task!r}: {name} has no tokens for the label {label!r}; take another base, "
                "or the protocol 'choices' alone"
            )
        for other, ids_other in zip(labels[:index], ids[:index], strict=True):
            shorter = min(len(own), len(ids_other))
            if own[:shorter] == ids_other[:shorter]:
                raise DataError(
                    f"task {task!r}: {name} does not tell the labels {other!r} and {label!r} "
                    f"apart: their tokens are {tokenizer.convert_ids_to_tokens(ids_other)} and "
                    f"{tokenizer.convert_ids_to_tokens(own)}; take another base, or the protocol "
                    "'choices' alone"
                )
    return ids


def _shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many ids all sequences begin with."""
    for place, ids in enumerate(zip(*sequences, strict=False)):
        if len(set(ids)) > 1:
            return place
    return min(map(len, sequences))


def prepare_choices(
    task: str, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> list[PreparedQuestion]:
    """See `ScoringProtocol`.

    Raises:
      DataError: a choice has no token.
    """
    pairs = iter(
        encode_pairs(tokenizer, [choice for question in questions for choice in question.choices])
    )
    prepared = []
    for question in questions:
        items = []
        for choice in question.choices:
            context, continuation = next(pairs)
            if not context or not continuation:
                part = "no token of the choice" if context else "no token before the choice"
                raise DataError(f"task {task!r}: {question.where}: {part} {choice.continuation!r}")
            items.append(ScoredSequence.continuation(context, continuation))
        prepared.append(PreparedQuestion(question, tuple(items)))
    return prepared


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Ids of each context, with what leads a text, and of what continues it."""
    examples = [
        Example((Piece(context, False), Piece(text, True)), leads=True, ends=False)
        for context, text in pairs
    ]
    encoded = encode_examples(examples, tokenizer, train_on_prompt=False)
    return [
        (ids[: -sum(mask)], ids[-sum(mask) :]) if any(mask) else (ids, []) for ids, mask in encoded
    ]


def _pick_label(question: Question, scores: Sequence[float]) -> Measures:
    del question
    return {"label_acc": int(np.argmax(scores))}


def _pick_choice(question: Question, scores: Sequence[float]) -> Measures:
    characters = [len(choice.continuation.strip()) for choice in question.choices]
    return {
        "acc": int(np.argmax(scores)),
        "acc_norm": int(np.argmax(np.asarray(scores) / characters)),
    }


SCORING_PROTOCOLS: Mapping[str, ScoringProtocol] = {
    "labels": ScoringProtocol(prepare_labels, ("label_acc",), _pick_label),
    "choices": ScoringProtocol(prepare_choices, ("acc", "acc_norm"), _pick_choice),
}
"""By the name that the user gives."""


# FIXME docstring of the merged evaluation.asking:
# """Tasks as token ids, checked against the base's vocabulary and context."""


class BaseLimits(NamedTuple):
    """What the base can take.

    Attributes:
      vocab_size: how many ids it knows.
      context: how many tokens it was made for.
      truncate: whether what is longer loses tokens at its start, or is refused.
    """

    vocab_size: int
    context: int
    truncate: bool


class PreparedTask(NamedTuple):
    """A task asked in one way.

    Attributes:
      task: the task's name.
      protocol: see `protocols`.
      prepared: its questions as token ids.
      cut: how many of them lost tokens at their start.
    """

    task: str
    protocol: str
    prepared: list[PreparedQuestion]
    cut: int

    @property
    def groups(self) -> list[tuple[ScoredSequence, ...]]:
        """The items of each question."""
        return [one.items for one in self.prepared]


def ask(
    questions: Mapping[str, Sequence[Question]],
    protocols: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: BaseLimits,
) -> list[PreparedTask]:
    """Each task in each way in which it can be asked.

    Args:
      questions: by task.
      protocols: names of `SCORING_PROTOCOLS`.
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
            prepared = SCORING_PROTOCOLS[protocol].prepare(task, own, tokenizer)
            if prepared:
                _check_vocabulary(prepared, tokenizer, limits.vocab_size)
                asked.append(_fitted(task, protocol, prepared, lead, limits))
        if len(asked) == before:
            raise ConfigError(f"task {task!r}: has no labels; take the protocol 'choices'")
    return asked


def max_candidates(asked: Sequence[PreparedTask]) -> int:
    """Of an item, at most."""
    counts = (len(item.candidates) for one in asked for items in one.groups for item in items)
    return max(counts, default=1)


def _check_vocabulary(
    prepared: Sequence[PreparedQuestion], tokenizer: PreTrainedTokenizerBase, vocab_size: int
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
    task: str, protocol: str, prepared: Sequence[PreparedQuestion], lead: int, limits: BaseLimits
) -> PreparedTask:
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
        fitted.append(PreparedQuestion(question, items))
    return PreparedTask(task, protocol, fitted, cut)
