"""A training run from start to end: `train` reads from top to bottom."""

import contextlib
import dataclasses
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_jax.checkpoints.store import TrainingStore, latest_step, read_metadata
from moe_jax.checkpoints.training_record import add_accuracies
from moe_jax.config.run import RunConfig, to_json
from moe_jax.errors import ConfigError, TrainingError
from moe_jax.hf.load import load_base
from moe_jax.sharding.memory import memory_errors
from moe_jax.sharding.mesh import require_platform
from moe_jax.training.records.metric_log import METRICS_FILE, Window, open_writers, require_writers
from moe_jax.training.records.plots import draw_run, loss_unit
from moe_jax.training.records.recorder import ProgressBar, Recorder, say
from moe_jax.training.run.adapter_reports import (
    TABLE_FILES,
    AdapterReport,
    adapter_reports,
    last_losses,
    table_lines,
    write_table,
)
from moe_jax.training.run.asynchronous import Background, Interrupts
from moe_jax.training.run.input_checks import load_starts
from moe_jax.training.run.inputs import phase_after, phases_of, read_inputs, require_same_inputs
from moe_jax.training.run.measurement import (
    FOLDER,
    EvaluationOfTasks,
    Evaluator,
    Stopped,
    Table,
    asks_for_tasks,
    by_task,
)
from moe_jax.training.run.session import Progress, TrainingSession, restore
from moe_jax.training.run.start_up import start_up_table
from moe_jax.training.run.workdir import WorkDir, is_main_process, lengths, require_same_run
from moe_jax.training.step.program import build_program

_ADVICE = (
    "give a larger config.training.micro_batches, a smaller batch_size or data.max_length, "
    "config.compute.remat 'narrow' or 'full', or config.base.param_dtype 'nf4'; "
    "train.py --plan says what a step takes"
)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      step: optimiser steps done, over all resumptions.
      total_steps: those that the configuration asks for, of the adapter with the most.
      adapters: the final folder of each adapter that has finished.
      validation: the last measured losses, by `adapter/set`.
      reports: how each adapter came out, the one with the lowest loss first.
      interrupted_by: the signal that stopped the run before its end, after saving.
      did_nothing: the run had already ended before.
      evaluation: what came of the tasks at the end; None without any, before that, and where this
        call did nothing.
    """

    step: int
    total_steps: int
    adapters: dict[str, Path]
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    reports: dict[str, AdapterReport] = dataclasses.field(default_factory=dict)
    interrupted_by: signal.Signals | None = None
    did_nothing: bool = False
    evaluation: Table | None = None


def train(
    config: RunConfig,
    workdir: Path,
    say: Callable[[str], None] = say,
    on_tasks: EvaluationOfTasks | None = None,
) -> TrainResult:
    """Trains the adapters of `config`; resumes if `workdir` holds training states of the same run.

    A resumed run ends with the same adapters, bit for bit, as one that was never interrupted, on
    the same number of devices.

    Args:
      config: the whole configuration.
      workdir: gets `config.json`, `metrics.jsonl`, `checkpoints/`, at each adapter's end
        `adapters/NAME`, and with `eval_every` also `best/NAME`, the adapter at its lowest mean
        validation loss. Of several adapters, at the end also a table: `adapters.json` and
        `adapters.md`. What came of tasks is in `evaluation/`.
      say: takes the lines for people; only called in the main process.
      on_tasks: measures adapters on tasks; `moe_jax.evaluation.training_evaluator.OnTasks`.

    Raises:
      UserError: the configuration, the base, the data, the devices, their memory or the disk will
        not do.
    """
    say = say if is_main_process() else lambda _: None
    require_writers(config.logging)
    if asks_for_tasks(config) and on_tasks is None:
        raise ValueError("an adapter is to be measured on tasks, but on_tasks is not given")
    if not any(own.data.num_workers for own in config.adapters.values()):
        # Before the data is read; processes that read it are forked before JAX may start.
        require_platform(config.compute)
    settings = json.loads(to_json(config))
    with WorkDir(workdir) as work, contextlib.ExitStack() as opened, memory_errors(_ADVICE):
        resume_step = latest_step(work.checkpoints)
        metadata, ended = {}, False
        if resume_step is not None:
            _require_same_settings(work, config, settings)
            metadata = read_metadata(work.checkpoints, resume_step)
            ended = _ended(work, settings, resume_step, metadata)
            if ended and _evaluated(on_tasks, config, metadata["steps"], work):
                say(f"already finished at step {resume_step}; nothing to do")
                progress = Progress(resume_step, metadata["validation"], metadata["best"])
                result = _result(work, metadata["steps"], progress)
                if not (work.folder / TABLE_FILES[-1]).exists():  # killed before it was written
                    _tabulate(work, result, say)
                return dataclasses.replace(result, did_nothing=True)

        inputs = read_inputs(config, say, resumes=resume_step is not None)
        if resume_step is not None:
            require_same_inputs(work.folder, metadata, config, inputs, resume_step)
        # The adapters whose steps are left, or ended with the state that was saved.
        phase = phase_after(phases_of(inputs.steps), resume_step or 0)
        program = build_program(config.narrowed(phase.adapters), inputs.base.config, inputs.steps)
        evaluator = None
        if on_tasks is not None and asks_for_tasks(config):
            evaluator = on_tasks.prepare(config, inputs, program)
        if ended:  # of which the table would compile a step that nobody makes
            say(f"training has ended at step {resume_step}; what is left is to evaluate")
        else:
            for label, text in start_up_table(config, inputs, program):
                say(f"{label:<12} {text}")

        starts = load_starts(program) if resume_step is None else {}
        writers = []
        if is_main_process():  # before the long work: a service may refuse
            # A new run also drops the line that stands for step 0, before any training.
            last_kept = -1 if resume_step is None else resume_step
            writers = open_writers(work.folder, config.logging, settings, last_kept, opened)

        params = load_base(
            inputs.base.folder, inputs.base.config, config.base.param_dtype, program.param_shardings
        )
        work.write_settings(settings)
        store = TrainingStore(
            work.checkpoints, every=config.checkpoints.every, keep=config.checkpoints.keep
        )
        with store, Background() as background, Interrupts() as interrupts:
            if resume_step is None:
                state = program.init_state(params, starts)
            else:
                state = restore(store, program, resume_step, inputs)
                say(f"resumed at step {resume_step}")
            progress = Progress(
                resume_step or 0, metadata.get("validation", {}), metadata.get("best", {})
            )
            window = Window(metadata.get("window"))
            shown = None if is_main_process() else False
            bar = ProgressBar(inputs.total_steps, progress.step, show=shown)
            losses = last_losses(work.folder / METRICS_FILE)
            recorder = Recorder(program, inputs.steps, writers, window, say, bar, losses)
            session = TrainingSession(
                config=config,
                inputs=inputs,
                params=params,
                store=store,
                background=background,
                recorder=recorder,
                interrupts=interrupts,
                progress=progress,
                work=work,
                say=say,
                evaluator=evaluator,
            )
            try:
                with bar:
                    session.run(program, state)
            except Exception as error:
                session.finish_save()
                if not isinstance(error, TrainingError):
                    raise
                raise TrainingError(f"{error}; {store.kept()}") from None

            result = _result(work, inputs.steps, progress)
            if progress.step < inputs.total_steps:
                say(f"saved at step {progress.step}; run the same command to resume")
                return dataclasses.replace(result, interrupted_by=interrupts.received)
            _tabulate(work, result, say)
            if is_main_process():
                units = {name: loss_unit(own.method) for name, own in config.adapters.items()}
                for file in draw_run(work.folder / METRICS_FILE, work.folder, units):
                    say(f"drew {file}")
            if evaluator is None:
                return result
            try:
                table = _evaluate(evaluator, session, result)
            except Stopped:
                say("stopped while evaluating; run the same command to go on")
                return dataclasses.replace(result, interrupted_by=interrupts.received)
            return dataclasses.replace(result, evaluation=table)


def _result(work: WorkDir, steps: Mapping[str, int], progress: Progress) -> TrainResult:
    reports = adapter_reports(steps, progress, work.adapters, work.folder / METRICS_FILE)
    folders = {name: work.adapters / name for name in steps if reports[name].folder is not None}
    return TrainResult(progress.step, max(steps.values()), folders, progress.validation, reports)


def _evaluate(evaluator: Evaluator, session: TrainingSession, result: TrainResult) -> Table:
    """Measures all adapters on their tasks, shows the table and leaves it in the work directory."""
    folder, say = session.work.folder / FOLDER, session.say
    table = evaluator.finish(result.adapters, session.params, folder, say, session.interrupts.noted)
    for name, adapter in session.config.adapters.items():
        if adapter.evaluation is not None:
            shares = table.shares(name)
            session.recorder.evaluation(result.step, name, shares)
            values = {key: share.value for key, share in shares.items()}
            add_accuracies(result.adapters[name], result.step, by_task(values))
    table.save(folder)
    say(table.to_markdown())
    say(f"the answers to all questions are in {folder}")
    return table


def _evaluated(
    on_tasks: EvaluationOfTasks | None, config: RunConfig, steps: Mapping[str, int], work: WorkDir
) -> bool:
    """Whether nothing is left to be measured on tasks."""
    if on_tasks is None or not asks_for_tasks(config):
        return True
    return on_tasks.is_done(config, steps, work.folder / FOLDER)


def _tabulate(work: WorkDir, result: TrainResult, say: Callable[[str], None]) -> None:
    """Shows several adapters side by side, and leaves the table in the work directory."""
    reports = list(result.reports.values())
    if len(reports) > 1 and is_main_process():
        for line in table_lines(reports):
            say(line)
        write_table(work.folder, reports)


def _require_same_settings(work: WorkDir, config: RunConfig, settings: dict[str, Any]) -> None:
    former = work.former_settings()
    if former is None:
        raise ConfigError(
            f"{work.folder}: holds training states but no config.json, so it is unclear what they "
            "are; give another --workdir"
        )
    require_same_run(former, config, settings, work.folder)


def _ended(work: WorkDir, settings: dict[str, Any], step: int, metadata: Mapping[str, Any]) -> bool:
    """Whether the run reached its last step and left all its adapters."""
    steps: dict[str, int] = metadata["steps"]
    return (
        metadata["lengths"] == lengths(settings)
        and step == max(steps.values())
        and all(work.exported_step(name) == count for name, count in steps.items())
    )
