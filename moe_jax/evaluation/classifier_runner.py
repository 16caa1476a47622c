"""Evaluates adapters with a score head on classification and regression tasks.

The prediction is read off the score head, not off generated text. Texts are tokenized as in
training (`moe_jax.data.encoding`): those longer than the context are cut at their end.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from moe_jax.adapters.method import require_language_model
from moe_jax.data.encoding import encode_texts
from moe_jax.errors import ConfigError, DataError
from moe_jax.evaluation.answer_journal import Journal, Record, journal_file
from moe_jax.evaluation.outcomes import Accuracy, MetricScore, TaskOutcome
from moe_jax.evaluation.question_runner import announcement, progress_bar, require_finite
from moe_jax.evaluation.scorer import Scorer
from moe_jax.evaluation.scoring_protocols import BaseLimits
from moe_jax.hf.base_model import BaseModel
from moe_jax.loaded.inference_model import NamedAdapter
from moe_jax.tasks.classification_metrics import measure
from moe_jax.tasks.families.glue import ClassificationTask, LabeledText
from moe_jax.tasks.task import Task

CLASSIFICATION = "classification"
"""Name of the protocol in results."""


class LabeledTask(NamedTuple):
    """Tokenized rows of a classification task.

    Attributes:
      task: classification task.
      rows: texts with labels.
      tokens: token ids of each row.
      num_truncated: number of rows that were cut at their end.
    """

    task: ClassificationTask
    rows: list[LabeledText]
    tokens: list[list[int]]
    num_truncated: int


def match_classifiers(
    classifiers: Sequence[NamedAdapter],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    limits: BaseLimits,
    *,
    has_language_model: bool,
) -> list[tuple[NamedAdapter, LabeledTask]]:
    """Pairs of each classifier with each task that has the same labels.

    Args:
      classifiers: adapters with `method.classification`.
      tasks: all tasks of the evaluation.
      tokenizer: tokenizer of the base.
      limits: vocabulary and context of the base.
      has_language_model: true if a language model answers all tasks too.

    Raises:
      ConfigError: a classifier matches no task, a task matches no model, or a task has no labels.
      DataError: the data cannot be read or does not fit the base.
    """
    pairs = _match_labels(classifiers, tasks, has_language_model)
    matched_tasks = {task.name: task for _, task in pairs}
    labeled = {
        name: read_labeled_task(task, tokenizer, limits) for name, task in matched_tasks.items()
    }
    return [(adapter, labeled[task.name]) for adapter, task in pairs]


def _match_labels(
    classifiers: Sequence[NamedAdapter], tasks: Sequence[Task], has_language_model: bool
) -> list[tuple[NamedAdapter, ClassificationTask]]:
    pairs = []
    for adapter in classifiers:
        head = adapter.saved.method.classification
        num_before = len(pairs)
        for task in tasks:
            if not isinstance(task, ClassificationTask):
                purpose = f"answer the questions of the task {task.name!r}"
                require_language_model(adapter.saved.method, adapter.name, purpose)
            elif sorted(head.labels) == sorted(task.labels):
                pairs.append((adapter, task))
        if len(pairs) == num_before:
            labels = "; ".join(f"{task.name} has {_describe_labels(task)}" for task in tasks)
            raise ConfigError(
                f"adapter {adapter.name!r}: classifies {head.describe()}, which no task asks for "
                f"({labels}); give the task it was trained for"
            )
    for task in tasks:
        if classifiers and not has_language_model and not any(task is other for _, other in pairs):
            raise ConfigError(
                f"task {task.name!r}: no adapter classifies {_describe_labels(task)}; give one "
                "that does, or leave the task out"
            )
    return pairs


def read_labeled_task(
    task: ClassificationTask, tokenizer: PreTrainedTokenizerBase, limits: BaseLimits
) -> LabeledTask:
    """Reads and tokenizes the rows of a task.

    Raises:
      DataError: the data cannot be read, or does not fit the vocabulary or context of the base.
    """
    rows = task.labeled_rows()
    encoded = encode_texts([(row.text, row.text_pair) for row in rows], tokenizer)
    num_truncated = 0
    for row, ids in zip(rows, encoded, strict=True):
        if not ids:
            raise DataError(f"task {task.name!r}: {row.where}: the text has no token")
        limits.check_id(max(ids), tokenizer)
        if len(ids) > limits.context:
            num_truncated += 1
            if not limits.truncate:
                raise DataError(
                    f"task {task.name!r}: {row.where}: {len(ids)} tokens, and the base's context "
                    f"has {limits.context}; --truncate cuts its end off"
                )
    return LabeledTask(task, rows, [ids[: limits.context] for ids in encoded], num_truncated)


def open_classification_journal(
    folder: Path | None, base: BaseModel, adapter: NamedAdapter, labeled: LabeledTask, dtype: str
) -> Journal:
    """Opens the journal of a classifier and a task; see `question_runner.open_journal`."""
    content = json.dumps([labeled.tokens, [row.label for row in labeled.rows]])
    identity = {
        "base": base.identity.fingerprint,
        "adapter": adapter.digest,
        "items": hashlib.sha256(content.encode()).hexdigest()[:32],
        "dtype": dtype,
    }
    file = journal_file(folder, adapter.name, labeled.task.name, CLASSIFICATION)
    return Journal(file, identity, len(labeled.rows))


def classification_announcement(model: str, labeled: LabeledTask, journal: Journal) -> str:
    """Line printed before a classifier is evaluated."""
    title = f"{model}: {labeled.task.name}, {CLASSIFICATION}: {len(labeled.rows)} rows"
    return announcement(title, journal, labeled.num_truncated, "end")


def classify_rows(
    scorer: Scorer | None, adapter: NamedAdapter, labeled: LabeledTask, journal: Journal
) -> TaskOutcome:
    """Classifies all rows that the journal has no prediction for.

    Args:
      scorer: scorer of the base; None if the journal is complete.
      adapter: classifier with the labels of the task, in any order.
      labeled: rows.
      journal: receives the predictions.

    Raises:
      ConfigError: a score is not finite.
    """
    task, rows = labeled.task, labeled.rows
    head = adapter.saved.method.classification
    outputs = [head.labels.index(label) for label in task.labels] or [0]
    answered = [index in journal.records for index in range(len(rows))]
    batches = (
        ()
        if scorer is None or all(answered)
        else scorer.class_scores(labeled.tokens, adapter.adapter, answered)
    )
    with progress_bar(answered, f"{adapter.name} {task.name} {CLASSIFICATION}", "row") as bar:
        for batch in batches:
            records = []
            for index, values in batch:
                if not answered[index]:
                    ordered = values[outputs].tolist()
                    scores = require_finite(ordered, rows[index].where, adapter.name)
                    records.append(_record(index, rows[index], task.labels, scores))
            journal.add(records)
            bar.update(len(records))
    return _outcome(adapter.name, task, journal.finish())


def _record(index: int, row: LabeledText, labels: Sequence[str], scores: list[float]) -> Record:
    return {
        "question": index,
        "where": row.where,
        "answer": row.label,
        "picked": labels[int(np.argmax(scores))] if labels else scores[0],
        "scores": scores,
    }


def _outcome(model: str, task: ClassificationTask, records: Sequence[Mapping]) -> TaskOutcome:
    predictions = [record["picked"] for record in records]
    answers = [record["answer"] for record in records]
    if task.labels:
        predictions, answers = (
            [task.labels.index(label) for label in labels] for labels in (predictions, answers)
        )
    measures: dict[str, Any] = {}
    for name in task.metrics:
        value, error, count = measure(name, np.array(predictions), np.array(answers))
        if name == "accuracy":
            measures[name] = Accuracy(sum(map(int.__eq__, predictions, answers)), count)
        else:
            measures[name] = MetricScore(value, error, count)
    return TaskOutcome(model, task.name, CLASSIFICATION, measures, {}, records)


def _describe_labels(task: Task) -> str:
    labels = task.labels if isinstance(task, ClassificationTask) else ()
    return ", ".join(labels) if labels else "a number"
