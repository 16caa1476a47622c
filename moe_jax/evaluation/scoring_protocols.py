"""Scoring protocols: the two ways to read the answer to a question off a language model.

`labels`: the prompt lists the options, and the answer is the most likely label (`A`, `true`) after
it. If each label is a single token, this compares the logits of these tokens at the last position
of the prompt, as the reference does (MoE-PEFT, `evaluator.py`). Tokens that all labels share at
their start (such as a space) are appended to the prompt. Labels of several tokens are compared by
the log-likelihood of the whole label, which is equivalent for single tokens.

`choices`: the prompt does not list the options, and the answer is the option that is the most
likely continuation. `acc` compares the sums of the log-probabilities of the tokens, and `acc_norm`
these sums divided by the number of characters. (arXiv:2005.14165, section 2.4, divides by tokens;
characters, as in lm-evaluation-harness, are comparable between tokenizers.)

Texts are tokenized as in training: see `moe_jax.data.encoding`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.new_tokens import total_vocab_size
from moe_jax.config.model import ModelConfig
from moe_jax.data.encoding import Example, TextSpan, encode_examples
from moe_jax.data.tokenizer import encode, leading_tokens
from moe_jax.errors import ConfigError, DataError
from moe_jax.evaluation.packed_sequences import ScoredSequence, shared_prefix
from moe_jax.tasks.task import Question

PickedChoices = dict[str, int]
"""Index of the chosen option, by measure."""


class PreparedQuestion(NamedTuple):
    """A question as token ids.

    Attributes:
      question: question as text.
      sequences: sequence to score of each choice.
    """

    question: Question
    sequences: tuple[ScoredSequence, ...]


class ScoringProtocol(NamedTuple):
    """A way to score the choices of a question.

    Attributes:
      prepare: maps `(task name, questions, tokenizer)` to the prepared questions, or to an empty
        list if the protocol does not apply to the task.
      measures: names of the measures.
      pick: maps a question and the scores of its choices to the choice of each measure.
    """

    prepare: Callable[[str, Sequence[Question], PreTrainedTokenizerBase], list[PreparedQuestion]]
    measures: tuple[str, ...]
    pick: Callable[[Question, Sequence[float]], PickedChoices]


class BaseLimits(NamedTuple):
    """Vocabulary and context of a base model.

    Attributes:
      vocab_size: number of token ids.
      context: maximum number of tokens.
      truncate: truncates longer texts instead of rejecting them.
    """

    vocab_size: int
    context: int
    truncate: bool

    def check_id(self, largest: int, tokenizer: PreTrainedTokenizerBase) -> None:
        """Rejects the largest id of a text if the base has no embedding for it.

        Raises:
          DataError: the tokenizer belongs to another base, or an adapter lacks a new token.
        """
        if largest >= self.vocab_size:
            token = tokenizer.convert_ids_to_tokens(largest)
            remedy = "use the base's own tokenizer"
            added: Any = tokenizer  # the base class does not declare the method
            if token in added.get_added_vocab():
                remedy = "evaluate the base and adapters without this token separately"
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer gives the id {largest} ({token!r}), but "
                f"one of the models has embeddings for 0 to {self.vocab_size - 1} only; {remedy}"
            )


def base_limits(
    model: ModelConfig, methods: Iterable[AdapterMethod | None], truncate: bool
) -> BaseLimits:
    """Limits of a base with several adapters: what all of them can read.

    Args:
      model: architecture of the base.
      methods: methods of the adapters; None is the base alone.
      truncate: see `BaseLimits`.
    """
    sizes = [total_vocab_size(model.vocab_size, [] if m is None else [m]) for m in methods]
    return BaseLimits(min(sizes), model.max_position_embeddings, truncate)


class PreparedTask(NamedTuple):
    """The questions of a task, prepared for one protocol.

    Attributes:
      name: name of the task.
      protocol: name of the protocol.
      questions: questions as token ids.
      num_truncated: number of questions that were cut at their start.
    """

    name: str
    protocol: str
    questions: list[PreparedQuestion]
    num_truncated: int

    @property
    def sequences(self) -> list[tuple[ScoredSequence, ...]]:
        """Sequences of each question."""
        return [prepared.sequences for prepared in self.questions]


def prepare_tasks(
    questions: Mapping[str, Sequence[Question]],
    protocols: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limits: BaseLimits,
) -> list[PreparedTask]:
    """Tokenizes each task for each protocol that applies to it.

    Args:
      questions: questions by task.
      protocols: names in `SCORING_PROTOCOLS`.
      tokenizer: tokenizer of the base.
      limits: vocabulary and context of the base.

    Raises:
      ConfigError: no protocol applies to a task.
      DataError: the tokenizer does not distinguish the labels or does not match the base, or a
        question exceeds the context.
    """
    lead = len(leading_tokens(tokenizer))
    tasks = []
    for task, task_questions in questions.items():
        num_before = len(tasks)
        for protocol in protocols:
            prepared = SCORING_PROTOCOLS[protocol].prepare(task, task_questions, tokenizer)
            if prepared:
                limits.check_id(_largest_id(prepared), tokenizer)
                tasks.append(_fit_to_context(task, protocol, prepared, lead, limits))
        if len(tasks) == num_before:
            raise ConfigError(f"task {task!r}: has no labels; use the protocol 'choices'")
    return tasks


def _largest_id(prepared: Sequence[PreparedQuestion]) -> int:
    return max(
        token
        for question in prepared
        for sequence in question.sequences
        for token in (*sequence.tokens, *sequence.targets)
    )


def _fit_to_context(
    task: str, protocol: str, prepared: Sequence[PreparedQuestion], lead: int, limits: BaseLimits
) -> PreparedTask:
    questions, num_truncated = [], 0
    for question, sequences in prepared:
        longest = max(len(sequence.tokens) for sequence in sequences)
        if longest > limits.context:
            problem = (
                f"task {task!r}: {question.where}: {longest} tokens (protocol {protocol!r}), and "
                f"the base's context has {limits.context}"
            )
            if not limits.truncate:
                raise DataError(f"{problem}; use fewer shots, or --truncate to cut its start off")
            try:
                sequences = tuple(s.shortened(limits.context, lead) for s in sequences)
            except ValueError:
                raise DataError(f"{problem}; the choices alone are too long") from None
            num_truncated += 1
        questions.append(PreparedQuestion(question, sequences))
    return PreparedTask(task, protocol, questions, num_truncated)


def prepare_labels(
    task: str, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> list[PreparedQuestion]:
    """`ScoringProtocol.prepare` of the protocol `labels`.

    Raises:
      DataError: the tokenizer does not distinguish the labels.
    """
    if not all(question.labels for question in questions):
        return []
    prompts = [question.whole_prompt for question in questions]
    lead = leading_tokens(tokenizer)
    encoded = encode(tokenizer, prompts)
    # The ids of a label depend on the last line of the prompt only.
    cache: dict[tuple[str, tuple[str, ...]], list[list[int]]] = {}
    prepared = []
    for question, prompt, ids in zip(questions, prompts, encoded, strict=True):
        key = (prompt.rsplit("\n", 1)[-1], question.labels)
        if key not in cache:
            cache[key] = _label_ids(task, question, tokenizer)
        prepared.append(PreparedQuestion(question, _label_sequences([*lead, *ids], cache[key])))
    return prepared


def _label_sequences(prompt: list[int], labels: list[list[int]]) -> tuple[ScoredSequence, ...]:
    shared = shared_prefix(labels)
    context = [*prompt, *labels[0][:shared]]
    return tuple(ScoredSequence.continuation(context, label[shared:]) for label in labels)


def _label_ids(
    task: str, question: Question, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    labels, prompt = question.labels, question.whole_prompt
    pairs = encode_pairs(tokenizer, [(prompt, text) for text in question.label_texts])
    label_ids = [continuation for _, continuation in pairs]
    name = tokenizer.name_or_path or "the tokenizer"
    for index, (label, ids) in enumerate(zip(labels, label_ids, strict=True)):
        if not ids or tokenizer.unk_token_id in ids:
            raise DataError(
                f"task {task!r}: {name} has no tokens for the label {label!r}; use another base, "
                "or the protocol 'choices' alone"
            )
        for other, other_ids in zip(labels[:index], label_ids[:index], strict=True):
            shorter = min(len(ids), len(other_ids))
            if ids[:shorter] == other_ids[:shorter]:
                raise DataError(
                    f"task {task!r}: {name} does not distinguish the labels {other!r} and "
                    f"{label!r}: their tokens are {tokenizer.convert_ids_to_tokens(other_ids)} and "
                    f"{tokenizer.convert_ids_to_tokens(ids)}; use another base, or the protocol "
                    "'choices' alone"
                )
    return label_ids


def prepare_choices(
    task: str, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase
) -> list[PreparedQuestion]:
    """`ScoringProtocol.prepare` of the protocol `choices`.

    Raises:
      DataError: a choice has no token.
    """
    pairs = iter(
        encode_pairs(tokenizer, [choice for question in questions for choice in question.choices])
    )
    prepared = []
    for question in questions:
        sequences = []
        for choice in question.choices:
            context, continuation = next(pairs)
            if not context or not continuation:
                problem = "no token of the choice" if context else "no token before the choice"
                raise DataError(
                    f"task {task!r}: {question.where}: {problem} {choice.continuation!r}"
                )
            sequences.append(ScoredSequence.continuation(context, continuation))
        prepared.append(PreparedQuestion(question, tuple(sequences)))
    return prepared


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each context, with the leading special tokens, and of its continuation."""
    examples = [
        Example((TextSpan(context, False), TextSpan(text, True)), add_bos=True, add_eos=False)
        for context, text in pairs
    ]
    encoded = encode_examples(examples, tokenizer, train_on_prompt=False)
    return [
        (ids[: -sum(mask)], ids[-sum(mask) :]) if any(mask) else (ids, []) for ids, mask in encoded
    ]


def _pick_label(question: Question, scores: Sequence[float]) -> PickedChoices:
    del question
    return {"label_acc": int(np.argmax(scores))}


def _pick_choice(question: Question, scores: Sequence[float]) -> PickedChoices:
    characters = [len(choice.continuation.strip()) for choice in question.choices]
    return {
        "acc": int(np.argmax(scores)),
        "acc_norm": int(np.argmax(np.asarray(scores) / characters)),
    }


SCORING_PROTOCOLS: Mapping[str, ScoringProtocol] = {
    "labels": ScoringProtocol(prepare_labels, ("label_acc",), _pick_label),
    "choices": ScoringProtocol(prepare_choices, ("acc", "acc_norm"), _pick_choice),
}
"""Protocols by the name in `--protocols` and `EvaluationConfig.protocols`."""
