"""The training loop: data, step, record, measure, save; `train` runs it from start to result."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from moe_jax.config.run import RunConfig
from moe_jax.errors import DataError, memory_errors
from moe_jax.training.records.console import print_line
from moe_jax.training.run.completion import TrainResult, complete, repeated_result
from moe_jax.training.run.measurement import TaskEvaluation
from moe_jax.training.run.session import TrainingSession
from moe_jax.training.run.start_up import (
    MEMORY_ADVICE,
    open_session,
    read_saved_run,
    require_environment,
)
from moe_jax.training.run.workdir import WorkDir, is_main_process, require_same_start
from moe_jax.training.step.program import Program
from moe_jax.training.step.state import TrainState


def train_loop(session: TrainingSession, program: Program, state: TrainState) -> None:
    """Trains until the last step or an interrupt; both save the state.

    Args:
      session: state and operations of the run.
      program: compiled computations of the phase of `state`.
      state: training state; donated to the first step.
    """
    session.measure_at_start(program, state)
    for phase in session.remaining_phases():  # the adapters that train are fixed within a phase
        program, state = session.enter_phase(phase, program, state)
        try:
            for step, batch in session.batches(phase):
                state, metrics = session.dispatch_step(program, state, batch)
                session.record(step, batch, metrics)
                session.validate_if_due(phase, program, state)
                session.evaluate_tasks_if_due(phase, state)
                session.save_if_due(phase, state)
        except DataError as error:  # a row of streamed data
            raise DataError(f"{error}; {session.save_before_error(state)}") from None
        session.finish_adapters(phase, state)
        if session.is_interrupted:
            break
    session.wait_for_writes()


def train(
    config: RunConfig,
    workdir: Path,
    say: Callable[[str], None] = print_line,
    task_evaluation: TaskEvaluation | None = None,
    config_file: str | None = None,
) -> TrainResult:
    """Trains the adapters of `config`, and resumes if `workdir` has a training state of the run.

    A resumed run ends with the same adapters, bit for bit, as an uninterrupted one on the same
    number of devices.

    Args:
      config: configuration of the run.
      workdir: work directory. It gets `config.json`, `metrics.jsonl` and `checkpoints/`; after
        the last step of an adapter `adapters/NAME`; with `eval_every` also `best/NAME`, the
        adapter at its lowest mean validation loss; at the end of a run with several adapters a
        table of them, `adapters.json` and `adapters.md`; with tasks also `evaluation/`.
      say: prints a line; called in the main process only.
      task_evaluation: evaluates adapters on tasks, such as
        `moe_jax.evaluation.training_evaluator.TrainingTaskEvaluation`.
      config_file: text of a configuration file that makes `config`, written to `config.py`.

    Raises:
      UserError: the configuration, base, data or devices are invalid or differ between processes,
        or memory or disk is full.
    """
    say = say if is_main_process() else lambda _: None
    require_environment(config, task_evaluation)
    work_dir = WorkDir(workdir, config_file)
    with work_dir as work, memory_errors(MEMORY_ADVICE), contextlib.ExitStack() as opened:
        require_same_start(config, work, say)
        saved = read_saved_run(config, work, say, task_evaluation)
        if saved.is_complete:
            return repeated_result(saved, work, say)
        work.claim()
        say(f"{'run':<12} {work.folder}")
        try:
            opening = open_session(config, work, saved, say, task_evaluation, opened)
        except (KeyboardInterrupt, SystemExit) as stop:  # later `Interrupts` handles signals
            kept = [] if saved.step is None else [f"the state at step {saved.step} is kept"]
            kept += getattr(stop, "__notes__", [])
            say(f"stopped before a step was made; {'; '.join(kept) or 'nothing is saved'}")
            raise
        session, program, state = opening
        with session.complete_saves_on_error(), session.recorder.bar:
            train_loop(session, program, state)
        return complete(session)
