"""Questions of tasks as training rows, with the prompts of evaluation."""

import json
from pathlib import Path
from typing import Literal

import datasets

from moe_jax.config.data import SourceConfig
from moe_jax.data.sources import RowTable, read_source, select_part
from moe_jax.data.table_cache import cache_key
from moe_jax.errors import DataError
from moe_jax.tasks.families.glue import ClassificationTask
from moe_jax.tasks.selection import named_task
from moe_jax.tasks.task import TASKS, Question, Task


def read_source_or_task(
    source: SourceConfig, cache_dir: str | None, *, folder: str | None, classified: bool = False
) -> RowTable:
    """Reads a data set, as `read_source` does, or the training rows of a task.

    Args:
      source: data set or task to read.
      cache_dir: cache folder of a data set's table; unused for a task.
      folder: folder with a folder of rows for each task; None reads them from the hub.
      classified: if true, rows of a task are texts with labels in place of questions.

    Raises:
      ConfigError: there is no such task.
      DataError: the rows cannot be read, do not fit, or have no such answer.
    """
    if source.task is None:
        return read_source(source, cache_dir)
    split, _, _ = source.split.partition("[")
    task = source_task(source, folder)
    rows = labeled_rows(task) if classified else question_rows(task, source.answer)
    table = RowTable(datasets.Dataset.from_list(rows), cache_key(rows))
    return select_part(table, source, split)


def source_task(source: SourceConfig, folder: str | None) -> Task:
    """Creates the task that a source names, with the training split.

    Raises:
      ConfigError: there is no such task.
      DataError: `folder` has no folder for the task.
    """
    assert source.task is not None
    (path,) = source.paths
    split: str | None = source.split.partition("[")[0]
    if path and split == "train" and Path(path).expanduser().is_file():
        split = None  # a single file has no splits
    return named_task(source.task, data=folder, path=path or None, split=split, shots=0)


def question_rows(task: Task, answer: Literal["label", "choice"]) -> list[dict[str, str]]:
    """Prompt, completion and origin (`where`) of each question.

    Args:
      task: task whose rows have answers.
      answer: see `SourceConfig.answer`.

    Raises:
      DataError: the data cannot be read, a row does not fit, or the task has no labels.
    """
    rows = []
    for question in task.questions():
        prompt, completion = _prompt_and_completion(task.name, question, answer)
        rows.append({"prompt": prompt, "completion": completion, "where": question.where})
    return rows


def labeled_rows(task: Task) -> list[dict[str, str]]:
    """Checked rows of a classification task in the schema `classification`.

    Raises:
      DataError: the task has no labels, its data cannot be read, or a row does not fit.
    """
    if not isinstance(task, ClassificationTask):
        known = ", ".join(n for n, cls in TASKS.items() if issubclass(cls, ClassificationTask))
        raise DataError(f"task {task.name!r}: is not a classification task; known: {known}")
    return [
        {
            "text": row.text,
            "text_pair": row.text_pair,
            "label": json.dumps(row.label),
            "where": row.where,
        }
        for row in task.labeled_rows()
    ]


def _prompt_and_completion(task: str, question: Question, answer: str) -> tuple[str, str]:
    if answer == "choice":
        return question.choices[question.answer]
    if not question.labels:
        raise DataError(f"task {task!r}: has no labels to learn; set answer to 'choice'")
    return question.whole_prompt, question.label_texts[question.answer]
