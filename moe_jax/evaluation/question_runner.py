"""Answers the questions of a task with a model and records each answer in a journal."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from moe_jax.errors import ConfigError
from moe_jax.evaluation.answer_journal import Journal, Record, journal_file
from moe_jax.evaluation.outcomes import TaskOutcome, count_correct
from moe_jax.evaluation.packed_sequences import sequences_digest
from moe_jax.evaluation.scorer import Scorer
from moe_jax.evaluation.scoring_protocols import SCORING_PROTOCOLS, PreparedTask
from moe_jax.hf.base_model import BaseModel
from moe_jax.loaded.inference_model import BASE, Adapter, NamedAdapter
from moe_jax.tasks.task import Question
from moe_jax.training.run.measurement import EvaluationInterrupted
from moe_jax.training.run.workdir import is_main_process


def model_name(adapter: NamedAdapter | None) -> str:
    """Name of a model in results: that of its adapter, or `base`."""
    return BASE if adapter is None else adapter.name


def open_journal(
    folder: Path | None,
    base: BaseModel,
    adapter: NamedAdapter | None,
    task: PreparedTask,
    dtype: str,
    replaceable: Collection[str] = (),
) -> Journal:
    """Opens the journal of a model and a task.

    Args:
      folder: results folder; None keeps the answers in memory only.
      base: base model.
      adapter: adapter of the base; None is the base alone.
      task: questions.
      dtype: dtype of weights and computation.
      replaceable: see `Journal`.

    Raises:
      ConfigError: the answers in the folder belong to another evaluation.
      CheckpointError: the journal is damaged or cannot be read.
    """
    answers = [prepared.question.answer for prepared in task.questions]
    identity = {
        "base": base.identity.fingerprint,
        "adapter": None if adapter is None else adapter.digest,
        "items": sequences_digest(task.sequences, answers),
        "dtype": dtype,
    }
    file = journal_file(folder, model_name(adapter), task.name, task.protocol)
    return Journal(file, identity, len(task.questions), replaceable)


def question_announcement(model: str, task: PreparedTask, journal: Journal) -> str:
    """Line printed before a model answers the questions of a task."""
    title = f"{model}: {task.name}, {task.protocol}: {len(task.questions)} questions"
    return announcement(title, journal, task.num_truncated, "start")


def announcement(
    title: str, journal: Journal, num_truncated: int, side: Literal["start", "end"]
) -> str:
    """Line printed before a task is evaluated.

    Args:
      title: model, task, and number of questions or rows.
      journal: journal with the answers of earlier runs.
      num_truncated: number of questions or rows that exceed the context.
      side: side at which these are cut.
    """
    resumed = f", {len(journal.records)} answered before" if journal.records else ""
    truncated = f", {num_truncated} cut at their {side} to fit the context" if num_truncated else ""
    return title + resumed + truncated


def answer_questions(
    scorer: Scorer | None,
    model: str,
    adapter: Adapter | None,
    task: PreparedTask,
    journal: Journal,
    stop: Callable[[], bool] = lambda: False,
) -> TaskOutcome:
    """Answers all questions that the journal has no answer to.

    Args:
      scorer: scorer of the base; None if the journal is complete.
      model: name of the model in results.
      adapter: None scores the base.
      task: questions.
      journal: receives the answers.
      stop: called after each batch; true ends the evaluation.

    Raises:
      EvaluationInterrupted: `stop` returned true before the end; the journal has the answers
        so far.
      ConfigError: a score is not finite.
    """
    groups = task.sequences
    protocol = SCORING_PROTOCOLS[task.protocol]
    answered = [index in journal.records for index in range(len(groups))]
    incomplete: dict[int, dict[int, float]] = {}
    batches = () if scorer is None or all(answered) else scorer.scores(groups, adapter, answered)
    with progress_bar(answered, f"{model} {task.name} {task.protocol}", "question") as bar:
        for batch in batches:
            records = []
            for index, sequence, score in batch:
                if answered[index]:
                    continue  # shares a batch with unanswered questions
                incomplete.setdefault(index, {})[sequence] = score.log_prob
                if len(incomplete[index]) == len(groups[index]):
                    values = [value for _, value in sorted(incomplete.pop(index).items())]
                    question = task.questions[index].question
                    scores = require_finite(values, question.where, model)
                    picked = protocol.pick(question, scores)
                    records.append(_record(index, question, scores, picked))
            journal.add(records)
            bar.update(len(records))
            if stop() and not journal.is_complete:
                raise EvaluationInterrupted
    return count_correct(model, task.name, task.protocol, protocol.measures, journal.finish())


def progress_bar(answered: Sequence[bool], title: str, unit: str) -> tqdm:
    """Progress bar over questions or rows, shown on a terminal only.

    Args:
      answered: true for those answered by an earlier run.
      title: text before the bar.
      unit: name of what is counted.
    """
    return tqdm(
        total=len(answered),
        initial=sum(answered),
        desc=title,
        unit=unit,
        leave=False,
        disable=None if is_main_process() else True,
    )


def require_finite(scores: Sequence[float], where: str, model: str) -> list[float]:
    """Returns `scores`, or raises an error that names the model and the row.

    Raises:
      ConfigError: a score is not finite.
    """
    if not all(map(math.isfinite, scores)):
        raise ConfigError(
            f"{model}: the scores of {where} are not finite; use another dtype (bfloat16 or "
            "float32), or check the checkpoint's weights"
        )
    return list(scores)


def _record(index: int, question: Question, scores: list[float], picked: dict[str, int]) -> Record:
    return {
        "question": index,
        "where": question.where,
        "subject": question.subject,
        "answer": question.answer,
        "picked": picked,
        "scores": scores,
    }
