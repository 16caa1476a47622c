"""Adapters with a score head on tasks of texts with labels: read off the head, not asked in words.

A text becomes ids as in training (`moe_jax.data.encoding`), and what is too long loses its end, as it
does there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.adapters.method import require_language_model
from moe_jax.config.classification import ClassificationConfig
from moe_jax.data.encoding import encode_texts
from moe_jax.errors import ConfigError, DataError
from moe_jax.evaluation.answer_journal import Journal, Record
from moe_jax.evaluation.evaluation_results import Accuracy, Metric, TaskOutcome
from moe_jax.evaluation.question_runner import announced, finite, journal_file, progress_bar
from moe_jax.evaluation.scorer import ScoredSequence, Scorer
from moe_jax.evaluation.scoring_protocols import BaseLimits
from moe_jax.loaded.model import BaseFiles, NamedAdapter
from moe_jax.tasks.classification_metrics import measure
from moe_jax.tasks.families.glue import ClassificationTask, LabelledText
from moe_jax.tasks.task import Task

PROTOCOL = "classification"
"""What results call this way of answering."""


class LabelledTask(NamedTuple):
    """A task's rows, ready for a score head.

    Attributes:
      task: the task.
      rows: with their labels.
      tokens: ids of each row.
      cut: how many of them lost tokens at their end.
    """

    task: ClassificationTask
    rows: list[LabelledText]
    tokens: list[list[int]]
    cut: int

    @property
    def num_scores(self) -> int:
        """Outputs of a score head for it."""
        return len(self.task.labels) or 1


def match_classifiers(
    classifiers: Sequence[NamedAdapter],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    limits: BaseLimits,
    *,
    answered: bool,
) -> list[tuple[NamedAdapter, LabelledTask]]:
    """Each classifier with the rows of each task that has its labels.

    Args:
      classifiers: adapters with `method.classification`.
      tasks: all that are evaluated.
      tokenizer: the base's own.
      limits: the base's.
      answered: whether another model answers all tasks in words.

    Raises:
      ConfigError: a classifier has no task, a task no model, or a task has no labels.
      DataError: the data cannot be used, or does not fit the base.
    """
    matched = _matched(classifiers, tasks, answered)
    rows = {task.name: task for _, task in matched}
    read = {name: read_labelled_task(task, tokenizer, limits) for name, task in rows.items()}
    return [(one, read[task.name]) for one, task in matched]


def _matched(
    classifiers: Sequence[NamedAdapter], tasks: Sequence[Task], answered: bool
) -> list[tuple[NamedAdapter, ClassificationTask]]:
    found = []
    for one in classifiers:
        own = one.saved.method.classification
        for task in tasks:
            if not isinstance(task, ClassificationTask):
                what = f"answer the questions of the task {task.name!r}"
                require_language_model(one.saved.method, one.name, what)
            elif _same_labels(own, task):
                found.append((one, task))
        if not any(one is other for other, _ in found):
            labels = "; ".join(f"{t.name} has {_labels(t)}" for t in tasks)
            raise ConfigError(
                f"adapter {one.name!r}: classifies {own.describe()}, which no task asks for "
                f"({labels}); give the task it was trained for"
            )
    for task in tasks:
        if classifiers and not answered and not any(task is other for _, other in found):
            raise ConfigError(
                f"task {task.name!r}: none of the adapters classifies {_labels(task)}; give one "
                "that does, or leave the task out"
            )
    return found


def read_labelled_task(
    task: ClassificationTask, tokenizer: PreTrainedTokenizerBase, limits: BaseLimits
) -> LabelledTask:
    """A task's rows as ids, checked against the base's vocabulary and context.

    Raises:
      DataError: the data cannot be used, or does not fit the base.
    """
    rows = task.labelled_rows()
    encoded = encode_texts([(row.text, row.text_pair) for row in rows], tokenizer)
    cut = 0
    for row, ids in zip(rows, encoded, strict=True):
        if not ids:
            raise DataError(f"task {task.name!r}: {row.where}: the text has no token")
        if max(ids) >= limits.vocab_size:
            raise DataError(
                f"{tokenizer.name_or_path}: the tokenizer gives the id {max(ids)}, but the base "
                f"has embeddings for 0 to {limits.vocab_size - 1}; take that base's own tokenizer"
            )
        if len(ids) > limits.context:
            cut += 1
            if not limits.truncate:
                raise DataError(
                    f"task {task.name!r}: {row.where}: {len(ids)} tokens, and the base's context "
                    f"has {limits.context}; --truncate cuts its end off"
                )
    return LabelledTask(task, rows, [ids[: limits.context] for ids in encoded], cut)


def open_classification_journal(
    folder: Path | None, base: BaseFiles, adapter: NamedAdapter, labelled: LabelledTask, dtype: str
) -> Journal:
    """How a classifier has classified rows so far; see `answering.open_journal`."""
    content = json.dumps([labelled.tokens, [row.label for row in labelled.rows]])
    identity = {
        "base": base.identity.fingerprint,
        "adapter": adapter.digest,
        "items": hashlib.sha256(content.encode()).hexdigest()[:32],
        "dtype": dtype,
    }
    file = journal_file(folder, adapter.name, labelled.task.name, PROTOCOL)
    return Journal(file, identity, len(labelled.rows))


def classification_announcement(
    adapter: NamedAdapter, labelled: LabelledTask, journal: Journal
) -> str:
    """What is about to be classified, for people."""
    title = f"{adapter.name}: {labelled.task.name}, {PROTOCOL}: {len(labelled.rows)} rows"
    return announced(title, journal, labelled.cut, "end")


def classify_rows(
    scorer: Scorer | None, adapter: NamedAdapter, labelled: LabelledTask, journal: Journal
) -> TaskOutcome:
    """Has all rows classified that the journal does not know.

    Args:
      scorer: None where it knows all.
      adapter: a classifier with the task's labels, in any order.
      labelled: the rows.
      journal: gets the scores.

    Raises:
      ConfigError: a score is not finite.
    """
    task, rows = labelled.task, labelled.rows
    own = adapter.saved.method.classification
    order = [own.labels.index(label) for label in task.labels] or [0]
    groups = [(ScoredSequence.next_token(ids, order),) for ids in labelled.tokens]
    known = [index in journal.records for index in range(len(rows))]
    batches = () if scorer is None or all(known) else scorer.scores(groups, adapter.adapter, known)
    with progress_bar(known, f"{adapter.name} {task.name} {PROTOCOL}", "row") as bar:
        for batch in batches:
            done = [
                _record(
                    index,
                    rows[index],
                    task.labels,
                    finite(score.values, rows[index].where, adapter.name),
                )
                for index, _, score in batch
                if not known[index]
            ]
            journal.add(done)
            bar.update(len(done))
    return _outcome(adapter.name, task, journal.finish())


def _record(index: int, row: LabelledText, labels: Sequence[str], scores: list[float]) -> Record:
    return {
        "question": index,
        "where": row.where,
        "answer": row.label,
        "picked": labels[int(np.argmax(scores))] if labels else scores[0],
        "scores": scores,
    }


def _outcome(model: str, task: ClassificationTask, examples: Sequence[Mapping]) -> TaskOutcome:
    picked, answers = [one["picked"] for one in examples], [one["answer"] for one in examples]
    if task.labels:
        picked, answers = (list(map(task.labels.index, some)) for some in (picked, answers))
    measures: dict[str, Any] = {}
    for name in task.metrics:
        value, error, count = measure(name, np.array(picked), np.array(answers))
        if name == "accuracy":
            measures[name] = Accuracy(sum(map(int.__eq__, picked, answers)), count)
        else:
            measures[name] = Metric(value, error, count)
    return TaskOutcome(model, task.name, PROTOCOL, measures, {}, examples)


def _same_labels(own: ClassificationConfig, task: ClassificationTask) -> bool:
    return sorted(own.labels) == sorted(task.labels)


def _labels(task: Task) -> str:
    labels = task.labels if isinstance(task, ClassificationTask) else ()
    return ", ".join(labels) if labels else "a number"
