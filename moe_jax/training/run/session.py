"""Events of the training loop: batches, steps, records, measurements and saves."""

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.checkpoints.adapter_files import (
    SavedAdapter,
    add_pictures,
    capture_adapter,
    save_adapter,
)
from moe_jax.checkpoints.store import TrainingStore, capture_state
from moe_jax.config.parse import to_plain
from moe_jax.config.run import RunConfig
from moe_jax.data.batch import Batch
from moe_jax.errors import TrainingError
from moe_jax.files.folders import current_folder
from moe_jax.training.records.console import stage
from moe_jax.training.records.metric_lines import METRICS_FILE, JsonLines, read_metrics
from moe_jax.training.records.metric_log import skipped_steps
from moe_jax.training.records.plots import adapter_pictures, loss_unit
from moe_jax.training.records.recorder import Recorder
from moe_jax.training.run.adapter_reports import build_training_record
from moe_jax.training.run.background import BackgroundWriter, Interrupts
from moe_jax.training.run.inputs import Inputs, Phase, Progress, phases_after, phases_of
from moe_jax.training.run.measurement import EvaluationInterrupted, TaskEvaluator, validate
from moe_jax.training.run.workdir import WorkDir, is_main_process, step_counts
from moe_jax.training.step.micro_batches import join_rows
from moe_jax.training.step.program import Program
from moe_jax.training.step.state import TrainState, restrict_state

_CLOCK_EVERY = 50
"""Steps between two looks at the clock of the main process, with several processes. A look waits
for the device."""


@dataclass(kw_only=True)
class TrainingSession:
    """Events of the training loop, in the order in which `train_loop` calls them.

    Attributes:
      config: configuration of the run.
      inputs: base, data and steps.
      params: frozen base parameters.
      store: training states on disk.
      background: writes the best adapters.
      recorder: records the metrics.
      metric_lines: `metrics.jsonl`, which the recorder writes to; None in further processes.
      interrupts: signals that stop the run.
      progress: position of the run; changed in place.
      work: work directory, with the final and best adapters.
      say: prints a line.
      references: fingerprints of the references that scored the data, by adapter.
      evaluator: evaluates adapters on tasks; None without tasks.
      is_interrupted: True once the loop must stop after its present step.
    """

    config: RunConfig
    inputs: Inputs
    params: Any
    store: TrainingStore
    background: BackgroundWriter
    recorder: Recorder
    metric_lines: JsonLines | None
    interrupts: Interrupts
    progress: Progress
    work: WorkDir
    say: Callable[[str], None]
    references: Mapping[str, str] = field(default_factory=dict)
    evaluator: TaskEvaluator | None = None
    is_interrupted: bool = field(default=False, init=False)
    _start: int = field(init=False)
    """Step at which this process began."""
    _compiled_lengths: set[int] = field(default_factory=set, init=False)
    _saved_at: float = field(default_factory=time.monotonic, init=False)
    _positions: dict[str, Any] = field(default_factory=dict, init=False)
    """Positions of the data before the newest batch, by adapter."""

    def __post_init__(self):
        self._start = self.progress.step

    def remaining_phases(self) -> tuple[Phase, ...]:
        """Phases from the current step on."""
        return phases_after(phases_of(self.inputs.steps), self.progress.step)

    def measure_at_start(self, program: Program, state: TrainState) -> None:
        """Measures the adapters before step 1, when they equal the base, for comparison.

        In a run that resumes, completes an evaluation that a signal has interrupted.
        """
        names = self.progress.unevaluated
        if self.progress.step == 0:
            names = self.remaining_phases()[0].adapters
            self._validate(program, state, names)
        self._evaluate_tasks(state, names)

    def enter_phase(
        self, phase: Phase, program: Program, state: TrainState
    ) -> tuple[Program, TrainState]:
        """Program and state of a phase, from those of the phase before or of the same phase."""
        self._compiled_lengths.clear()
        if set(program.config.adapters) != set(phase.adapters):
            program.compiled.clear()  # callers may still hold the former program
            program = program.narrowed(phase.adapters)
            state = restrict_state(state, program.abstract_state)
            self.recorder.set_program(program)
        return program, state

    def batches(self, phase: Phase) -> Iterator[tuple[int, Batch]]:
        """Yields the number and NumPy batch of each step left in a phase, until interrupted."""
        iterators = [self.inputs.train[name].iterator for name in phase.adapters]
        while self.progress.step < phase.stop and not self.is_interrupted:
            self._positions = self._data_positions(phase)
            yield self.progress.step + 1, join_rows([next(iterator) for iterator in iterators])

    def dispatch_step(
        self, program: Program, state: TrainState, batch: Batch
    ) -> tuple[TrainState, Mapping[str, jax.Array]]:
        """Dispatches an optimizer step; `state` is donated."""
        rows = program.put_train_batch(batch)
        if batch.tokens.shape[1] in self._compiled_lengths:
            return program.train_step(state, self.params, rows)
        length = batch.tokens.shape[1]
        with self.recorder.paused():  # compiling does not count for the speed
            if length not in program.compiled:
                with stage(self.say, f"compiling the step for rows of {length} tokens"):
                    program.compiled_train_step(length)
            return program.train_step(state, self.params, rows)

    def record(self, step: int, batch: Batch, metrics: Mapping[str, jax.Array]) -> None:
        """Records a dispatched step; raises errors of earlier steps and background writes."""
        length = batch.tokens.shape[1]
        is_timed = length in self._compiled_lengths
        self._compiled_lengths.add(length)
        self.progress.step = step
        self.recorder.push(step, metrics, batch if is_timed else None)
        self.recorder.collect()
        self.interrupts.step_seconds = self.recorder.step_seconds
        self.background.check()
        self.is_interrupted = self.interrupts.is_requested()

    def validate_if_due(self, phase: Phase, program: Program, state: TrainState) -> None:
        """Measures validation losses every `eval_every` steps, and of adapters at their end."""
        if self._is_due(self.config.training.eval_every):
            self._validate(program, state, phase.adapters)
        elif self.progress.step == phase.stop:
            self._validate(program, state, phase.ending)

    def evaluate_tasks_if_due(self, phase: Phase, state: TrainState) -> None:
        """Evaluates adapters on tasks every `evaluation.every` steps, except at their end.

        Final adapters are evaluated together, once all have ended.
        """
        self._evaluate_tasks(state, phase.adapters)

    def save_if_due(self, phase: Phase, state: TrainState) -> None:
        """Starts saving the state at its intervals, at the end and when interrupted.

        The state after the last step of a phase still has the adapters that end with it.
        """
        step = self.progress.step
        is_last = step == self.inputs.total_steps or self.is_interrupted
        if is_last or self.store.due(step) or self._is_save_time(step):
            self._save(state, self._data_positions(phase))

    def save_before_error(self, state: TrainState) -> str:
        """Saves the state of the last step after an error of the next batch; says what is saved.

        Not with several processes, of which one alone may have met the error. Raises no second
        error.
        """
        step = self.progress.step
        if step > 0 and jax.process_count() == 1:
            with contextlib.suppress(Exception):
                # The iterators of some adapters may be past the batch.
                self._save(state, self._positions)
                self.recorder.drain()
                self.wait_for_writes()
                return f"the state at step {step} is saved; the same command resumes from it"
        return self.store.kept_state()

    def finish_adapters(self, phase: Phase, state: TrainState) -> None:
        """Writes the final folders of the adapters that end with a phase, if that is at its end."""
        self.recorder.drain()
        if self.progress.step == phase.stop:
            self.wait_for_writes()  # raises the error of a full disk before adapters are written
            for name in phase.ending:
                # A run that was killed in its final evaluation has written them. After a step here
                # its best folder may have been written again, without pictures.
                is_written = self.work.exported_step(name) == self.progress.step
                if not is_written or self.progress.step > self._start:
                    self._finish(name, state)

    def wait_for_writes(self) -> None:
        """Waits for the best adapters and training states that are being written."""
        self.background.wait()
        self.store.wait()

    @contextlib.contextmanager
    def complete_saves_on_error(self) -> Iterator[None]:
        """Completes the save in progress if an error is raised, and adds the saved step to it.

        Not with several processes: writing a state takes all of them, and the error may be in one.
        """
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:
                self.recorder.complete_deferred()
            with contextlib.suppress(Exception):
                self.store.wait()
            if not isinstance(error, TrainingError):
                raise
            raise TrainingError(f"{error}; {self.store.kept_state()}") from None

    def _is_save_time(self, step: int) -> bool:
        """True if `checkpoints.minutes` have passed since the last save; equal in all processes."""
        minutes = self.config.checkpoints.minutes
        is_time = minutes > 0 and time.monotonic() - self._saved_at >= 60 * minutes
        if jax.process_count() == 1 or minutes == 0:
            return is_time
        if step % _CLOCK_EVERY:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(is_time)))

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _validate(self, program: Program, state: TrainState, names: Collection[str]) -> None:
        """Measures the validation sets, and keeps the adapters that are the best yet."""
        data = {name: self.inputs.validation[name] for name in names}
        if not any(data.values()):
            return
        progress = self.progress
        self.recorder.drain()
        announced = contextlib.nullcontext()
        if progress.step == 0:  # nothing else is on the screen yet
            announced = stage(self.say, "measuring the validation loss before step 1")
        with announced, self.recorder.paused(), self.interrupts.during("this validation"):
            losses, metrics = validate(program, state.adapters, self.params, data, state.references)
        self.is_interrupted = self.is_interrupted or self.interrupts.is_requested()
        progress.validation |= losses
        self.recorder.write_validation(progress.step, losses, metrics)
        if not self.config.training.eval_every:
            return  # measured at the end only, where the final adapter is the best
        for name, sets in data.items():
            if progress.step == 0 and self.config.adapters[name].start_from is None:
                continue  # untrained
            labels = [f"{name}/{data_set}" for data_set in sets]
            mean = statistics.fmean(losses[label] for label in labels) if labels else math.inf
            preference, accuracy = self.config.adapters[name].preference, None
            if labels and preference is not None and preference.keep_best == "accuracy":
                accuracy = statistics.fmean(metrics[label]["reward_accuracy"] for label in labels)
            if progress.is_best(name, mean, accuracy):
                self.work.require_in_place()
                with self.recorder.paused():  # compiles the first time
                    adapter = self._saved_adapter(name, state)
                    write = capture_adapter(self.work.best / name, adapter)
                self.background.submit(write)

    def _evaluate_tasks(self, state: TrainState, names: Sequence[str]) -> None:
        """Evaluates the adapters that are due and not at their end."""
        progress, stop = self.progress, self.interrupts.is_requested
        progress.unevaluated = ()
        for index, name in enumerate(names):
            evaluation = self.config.adapters[name].evaluation
            is_due = evaluation is not None and self._is_due(evaluation.every)
            if self.evaluator is None or not is_due or progress.step == self.inputs.steps[name]:
                continue
            self.recorder.drain()
            try:
                with self.recorder.paused(), self.interrupts.during("this batch of questions"):
                    tree = state.adapters[name]
                    scores = self.evaluator.measure(name, tree, self.params, stop)
            except EvaluationInterrupted:
                progress.unevaluated, self.is_interrupted = names[index:], True
                return
            self.recorder.write_task_scores(progress.step, name, scores)

    def _data_positions(self, phase: Phase) -> dict[str, Any]:
        """Positions of the data of the adapters that train, by adapter."""
        return {name: self.inputs.train[name].iterator.get_state() for name in phase.adapters}

    def _save(self, state: TrainState, position: dict[str, Any]) -> None:
        """Copies the state on the device, as the next step reuses its arrays, and saves the copy.

        Writing starts a few steps later, once the metrics of this step are on the host: they are
        part of the metadata.
        """
        self.work.require_in_place()
        progress, step = self.progress, self.progress.step
        self._saved_at = time.monotonic()
        with self.recorder.paused():  # compiles the first time
            captured = capture_state(state.adapters, _without_adapters(state))
        metadata = {
            "base": self.inputs.base.identity._asdict(),
            "data": {name: self.inputs.data_fingerprint(name) for name in self.inputs.train},
            "steps": self.inputs.steps,
            "lengths": step_counts(to_plain(self.config)),
            "validation": progress.validation,
            "best": progress.best,
            "unevaluated": list(progress.unevaluated),
            "best_accuracy": progress.best_accuracy,
            "references": self.references,
        }
        position, metadata = copy.deepcopy((position, metadata))

        def write() -> None:
            self.background.wait()  # for the best adapters, whose losses are in the metadata
            if self.background.failed:
                return  # a best adapter is missing; its error was raised before
            lines = self.metric_lines
            records = {
                "window": list(self.recorder.window.steps),
                "metrics": None if lines is None else lines.identity(),
            }
            self.store.write(step, captured, data=position, metadata={**metadata, **records})

        self.recorder.after_metrics(step, write)

    def _finish(self, name: str, state: TrainState) -> None:
        """Writes the final folder of an adapter, before other adapters train on."""
        self.work.require_in_place()
        folder, best = self.work.adapters / name, self.work.best / name
        with self.recorder.paused():
            pictures: dict[str, bytes] = {}
            skipped = ""
            if is_main_process():
                lines = read_metrics(self.work.folder / METRICS_FILE, missing_ok=True)
                if count := skipped_steps(lines, name):
                    skipped = f"; steps skipped, as gradients were not finite: {count}"
                adapter = self.config.adapters[name]
                unit = loss_unit(adapter.method, adapter.preference)
                pictures = adapter_pictures(self.work.folder / METRICS_FILE, name, unit)
                # Before the final folder, without which the run counts as not finished.
                if current_folder(best).is_dir():
                    add_pictures(best, pictures)
                elif name in self.progress.best:  # deleted by hand; the final one is still written
                    self.say(f"adapter {name!r}: its best weights are no longer in {best}")
            save_adapter(folder, self._saved_adapter(name, state)._replace(pictures=pictures))
        step = self.progress.step
        self.say(f"adapter {name!r} finished at step {step}; it is in {folder}{skipped}")

    def _saved_adapter(self, name: str, state: TrainState) -> SavedAdapter:
        """Adapter with the content of its folder, except figures."""
        base, progress = self.inputs.base, self.progress
        record = build_training_record(
            self.config,
            self.inputs,
            name,
            progress=progress,
            training_loss=self.recorder.losses.get(name),
            metrics=self.work.folder / METRICS_FILE,
        )
        method, tree = self.config.adapters[name].method, state.adapters[name]
        return SavedAdapter(method, tree, base.config, base.identity, progress.step, record)


def restore(store: TrainingStore, program: Program, step: int, inputs: Inputs) -> TrainState:
    """Restores a training state onto the mesh of the run, and the position of its data.

    Args:
      store: training states.
      program: compiled computations of the phase that contains `step`.
      step: step of the state.
      inputs: inputs of the run; their iterators are moved.

    Raises:
      CheckpointError: the state is damaged, or does not fit the program.
    """
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.abstract_state,
        program.state_shardings,
    )
    saved = store.restore(step, target.adapters, _without_adapters(target))
    for name, position in saved.data.items():
        inputs.train[name].iterator.set_state(position)
    return TrainState(adapters=saved.adapters, **saved.optimizer)


def _without_adapters(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "loss_scale": state.loss_scale,
        "references": state.references,
    }
