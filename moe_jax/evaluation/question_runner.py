"""Has a model answer the questions of a task, and writes each answer down at once."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from moe_jax.config.parse import to_plain
from moe_jax.errors import ConfigError
from moe_jax.evaluation.answer_journal import Journal, Record
from moe_jax.evaluation.evaluation_results import TaskOutcome, outcome
from moe_jax.evaluation.scorer import Scorer, sequences_digest
from moe_jax.evaluation.scoring_protocols import SCORING_PROTOCOLS, PreparedTask
from moe_jax.loaded.model import BASE, Adapter, BaseFiles, NamedAdapter
from moe_jax.tasks.task import Question, Task
from moe_jax.training.run.measurement import Stopped


def model_name(adapter: NamedAdapter | None) -> str:
    """What results call an adapter, or the base without one."""
    return BASE if adapter is None else adapter.name


def open_journal(
    folder: Path | None,
    base: BaseFiles,
    adapter: NamedAdapter | None,
    asked: PreparedTask,
    dtype: str,
    anew: Collection[str] = (),
) -> Journal:
    """What a model has answered so far.

    Args:
      folder: of the results; None keeps the answers in memory only.
      base: the base.
      adapter: on it, if there is one.
      asked: the questions.
      dtype: in which all is computed.
      anew: see `Journal`.

    Raises:
      ConfigError: the answers in the folder belong to something else.
      CheckpointError: they are damaged, or cannot be read.
    """
    answers = [question.answer for question, _ in asked.prepared]
    identity = {
        "base": base.identity.fingerprint,
        "adapter": None if adapter is None else adapter.digest,
        "items": sequences_digest(asked.groups, answers),
        "dtype": dtype,
    }
    file = journal_file(folder, model_name(adapter), asked.task, asked.protocol)
    return Journal(file, identity, len(asked.prepared), anew)


def journal_file(folder: Path | None, model: str, task: str, protocol: str) -> Path | None:
    """Where the answers of a model are in the folder of results; None if there is no folder."""
    return None if folder is None else folder / "predictions" / model / f"{task}.{protocol}.jsonl"


def announcement(name: str, asked: PreparedTask, journal: Journal) -> str:
    """What is about to be asked, for people."""
    title = f"{name}: {asked.task}, {asked.protocol}: {len(asked.prepared)} questions"
    return announced(title, journal, asked.cut, "start")


def announced(title: str, journal: Journal, cut: int, end: Literal["start", "end"]) -> str:
    """An announcement, for people.

    Args:
      title: says who is to answer what, and how much of it.
      journal: knows what was answered before.
      cut: how many questions or rows lost tokens.
      end: where they lost them.
    """
    before = f", {len(journal.records)} answered before" if journal.records else ""
    shortened = f", {cut} cut at their {end} to fit the context" if cut else ""
    return title + before + shortened


def answer(
    scorer: Scorer | None,
    name: str,
    adapter: Adapter | None,
    asked: PreparedTask,
    journal: Journal,
    stop: Callable[[], bool] = lambda: False,
) -> TaskOutcome:
    """Has all questions answered that the journal does not know the answers of.

    Args:
      scorer: None where it knows all.
      name: what results call the model.
      adapter: None is the base as it is.
      asked: the questions.
      journal: gets the answers.
      stop: asked after each batch.

    Raises:
      Stopped: `stop` said so, and questions are left; the journal has the answers so far.
      ConfigError: a score is not finite.
    """
    groups = asked.groups
    protocol = SCORING_PROTOCOLS[asked.protocol]
    known = [index in journal.records for index in range(len(groups))]
    partial: dict[int, dict[int, tuple[float, ...]]] = {}
    batches = () if scorer is None or all(known) else scorer.scores(groups, adapter, known)
    with progress_bar(known, f"{name} {asked.task} {asked.protocol}", "question") as bar:
        for batch in batches:
            done = []
            for index, place, score in batch:
                if known[index]:
                    continue  # it only shared the batch
                partial.setdefault(index, {})[place] = score.values
                if len(partial[index]) == len(groups[index]):
                    parts = partial.pop(index)
                    scores = [value for place in sorted(parts) for value in parts[place]]
                    question = asked.prepared[index].question
                    picked = protocol.pick(question, finite(scores, question.where, name))
                    done.append(_record(index, question, scores, picked))
            journal.add(done)
            bar.update(len(done))
            if stop() and not journal.is_complete:
                raise Stopped
    return outcome(name, asked.task, asked.protocol, protocol.measures, journal.finish())


def progress_bar(known: Sequence[bool], title: str, unit: str) -> tqdm:
    """A bar of all that is to be answered, shown on a terminal only.

    Args:
      known: what was answered before.
      title: says what.
      unit: what is counted.
    """
    return tqdm(
        total=len(known), initial=sum(known), desc=title, unit=unit, leave=False, disable=None
    )


def finite(scores: Sequence[float], where: str, model: str) -> list[float]:
    """The scores that a model gives what stands in `where`.

    Raises:
      ConfigError: one is not finite.
    """
    if not all(map(math.isfinite, scores)):
        raise ConfigError(
            f"{model}: the scores of {where} are not finite; take another dtype (bfloat16 or "
            "float32), or look at the checkpoint's weights"
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


def settings(
    base: BaseFiles,
    models: Sequence[NamedAdapter | None],
    tasks: Sequence[Task],
    questions: Mapping[str, Sequence[Any]],
    asked: Sequence[PreparedTask],
    dtype: str,
) -> dict[str, Any]:
    """What was evaluated and how, as plain JSON values."""
    return {
        "base": base.identity._asdict(),
        "dtype": dtype,
        "models": [
            {"name": BASE, "adapter": None}
            if one is None
            else {
                "name": one.name,
                "adapter": one.origin,
                "digest": one.digest,
                "method": to_plain(one.saved.method),
                "step": one.saved.step,
            }
            for one in models
        ],
        "tasks": [
            {
                **to_plain(task),
                "name": task.name,
                "questions": len(questions[task.name]),
                "cut": {a.protocol: a.cut for a in asked if a.task == task.name},
            }
            for task in tasks
        ],
    }
