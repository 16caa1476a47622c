"""Completion of a run: its result, the table of adapters, figures and evaluation on tasks."""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from moe_jax.checkpoints.training_record import add_accuracies
from moe_jax.training.records.metric_lines import METRICS_FILE
from moe_jax.training.records.metric_log import nested_by_task
from moe_jax.training.records.plan import readable, resident_memory
from moe_jax.training.records.plots import draw_run, loss_unit
from moe_jax.training.run.adapter_reports import (
    TABLE_FILES,
    AdapterReport,
    adapter_reports,
    table_lines,
    write_table,
)
from moe_jax.training.run.inputs import Progress
from moe_jax.training.run.measurement import (
    EVALUATION_FOLDER,
    EvaluationInterrupted,
    ScoreTable,
    TaskEvaluator,
)
from moe_jax.training.run.session import TrainingSession
from moe_jax.training.run.start_up import SavedRun
from moe_jax.training.run.workdir import WorkDir, is_main_process


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
      step: optimizer steps done, over all resumptions.
      total_steps: optimizer steps of the configuration, of the adapter with the most.
      adapters: final folders of the adapters that have finished.
      validation: validation losses measured last, by `adapter/set`.
      reports: losses of each adapter, lowest first.
      interrupted_by: signal that stopped the run before its end, after saving.
      was_already_complete: True if the run had ended before.
      evaluation: scores on tasks; None without tasks, before the end, or if the run had ended
        before.
    """

    step: int
    total_steps: int
    adapters: dict[str, Path]
    validation: dict[str, float] = field(default_factory=dict)
    reports: dict[str, AdapterReport] = field(default_factory=dict)
    interrupted_by: signal.Signals | None = None
    was_already_complete: bool = False
    evaluation: ScoreTable | None = None


def complete(session: TrainingSession) -> TrainResult:
    """Reports on a run whose loop has ended; evaluates the final adapters if no step is left."""
    config, work, say = session.config, session.work, session.say
    progress, interrupts = session.progress, session.interrupts
    result = _result(work, session.inputs.steps, progress)
    if progress.step < session.inputs.total_steps:
        saved = f"saved at step {progress.step}; run the same command to resume"
        say(saved if progress.step else "stopped before a step was made; nothing is saved")
        return replace(result, interrupted_by=interrupts.received)
    work.require_in_place()
    _report_table(work, result, say)
    speed = session.recorder.speed()
    if speed is not None:
        say(f"mean speed: {speed}")
    resident = resident_memory()
    if resident is not None:
        say(f"peak memory of the process: {readable(resident.peak)} resident")
    if is_main_process():
        units = {n: loss_unit(a.method, a.preference) for n, a in config.adapters.items()}
        for file in draw_run(work.folder / METRICS_FILE, work.folder, units):
            say(f"drew {file}")
    if session.evaluator is None:
        return result
    try:
        table = _evaluate(session, session.evaluator, result)
    except EvaluationInterrupted:
        say("stopped while evaluating; run the same command to resume")
        return replace(result, interrupted_by=interrupts.received)
    return replace(result, evaluation=table)


def repeated_result(saved: SavedRun, work: WorkDir, say: Callable[[str], None]) -> TrainResult:
    """Result of a run that had ended before."""
    say(
        f"already finished at step {saved.step}; its adapters are in {work.adapters}; give another "
        "--workdir to train again"
    )
    result = _result(work, saved.metadata["steps"], saved.progress)
    if not (work.folder / TABLE_FILES[-1]).exists():  # the run was killed before writing it
        _report_table(work, result, say)
    return replace(result, was_already_complete=True)


def _result(work: WorkDir, steps: Mapping[str, int], progress: Progress) -> TrainResult:
    reports = adapter_reports(steps, progress, work.adapters, work.folder / METRICS_FILE)
    folders = {name: work.adapters / name for name in steps if reports[name].folder is not None}
    return TrainResult(progress.step, max(steps.values()), folders, progress.validation, reports)


def _report_table(work: WorkDir, result: TrainResult, say: Callable[[str], None]) -> None:
    """Prints and writes the table of several adapters."""
    reports = list(result.reports.values())
    if len(reports) > 1 and is_main_process():
        for line in table_lines(reports):
            say(line)
        write_table(work.folder, reports)


def _evaluate(
    session: TrainingSession, evaluator: TaskEvaluator, result: TrainResult
) -> ScoreTable:
    """Evaluates the final adapters on their tasks; prints and writes the scores."""
    folder, say = session.work.folder / EVALUATION_FOLDER, session.say
    stop = session.interrupts.is_requested
    with session.interrupts.during("this batch of questions"):
        table = evaluator.finish(result.adapters, session.params, folder, say, stop)
    for name, adapter in session.config.adapters.items():
        if adapter.evaluation is not None:
            scores = table.scores(name)
            session.recorder.write_task_scores(result.step, name, scores)
            values = {key: score.value for key, score in scores.items()}
            if is_main_process():
                add_accuracies(result.adapters[name], result.step, nested_by_task(values))
    if is_main_process():
        table.save(folder)
    say(table.to_markdown())
    say(f"the answers to all questions are in {folder}")
    return table
