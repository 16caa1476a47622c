"""The steps of a run, with what happens between them: measuring, recording, saving, stopping."""

import contextlib
import copy
import math
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax

from moe_jax.checkpoints.adapter_files import (
    SavedAdapter,
    add_pictures,
    captured_adapter,
    save_adapter,
)
from moe_jax.checkpoints.store import TrainingStore, capture
from moe_jax.config.parse import to_plain
from moe_jax.config.run import RunConfig
from moe_jax.files.folders import current_folder
from moe_jax.training.records.metric_log import METRICS_FILE
from moe_jax.training.records.plots import adapter_pictures, loss_unit
from moe_jax.training.records.recorder import Recorder
from moe_jax.training.run.adapter_reports import training_record
from moe_jax.training.run.asynchronous import Background, Interrupts
from moe_jax.training.run.inputs import Inputs, Phase, phase_after, phases_of
from moe_jax.training.run.measurement import Evaluator, Stopped, validate
from moe_jax.training.run.workdir import WorkDir, is_main_process, lengths
from moe_jax.training.step.micro_batches import join_rows
from moe_jax.training.step.program import Program
from moe_jax.training.step.state import TrainState, carried_over


@dataclass
class Progress:
    """What changes besides the state and the data's position; saved with them.

    Attributes:
      step: optimiser steps done.
      validation: the losses measured last, by `adapter/set`.
      best: the lowest mean validation loss so far, by adapter.
    """

    step: int
    validation: dict[str, float]
    best: dict[str, float]


@dataclass(frozen=True)
class TrainingSession:
    """Everything that the steps of a run need.

    Attributes:
      config: the run's configuration.
      inputs: base, data and length.
      params: the frozen base.
      store: the training states.
      background: writes the best adapters.
      recorder: takes the metrics.
      interrupts: says when to stop early.
      progress: where the run stands; changed in place.
      work: gets the final adapters, and each as it was at its lowest validation loss.
      say: takes the lines for people.
      evaluator: asks the adapters the questions of their tasks; None where they have none.
    """

    config: RunConfig
    inputs: Inputs
    params: Any
    store: TrainingStore
    background: Background
    recorder: Recorder
    interrupts: Interrupts
    progress: Progress
    work: WorkDir
    say: Callable[[str], None]
    evaluator: Evaluator | None = None

    def run(self, program: Program, state: TrainState) -> None:
        """Steps until the end, or until interrupted; then all is saved.

        Args:
          program: of the phase that `state` belongs to.
          state: where training stands; do not use it again.
        """
        phases, progress = phases_of(self.inputs.steps), self.progress
        phase = phase_after(phases, progress.step)
        if progress.step == 0:  # untrained adapters are the base as it is: what to compare with
            self._measure(program, state, phase.adapters)
            self._ask_between(state, phase.adapters)
        while True:
            state, stopped = self._steps(phase, program, state)
            if progress.step == phase.stop:
                self.background.wait()
                self.store.wait()  # if the disk is full, the state is what to hear of first
                for name in phase.ending:
                    # A run that was killed in its last evaluation has left them already.
                    if self.work.exported_step(name) != progress.step:
                        self._finish(name, state)
            if stopped or phase == phases[-1]:
                break
            phase = phases[phases.index(phase) + 1]
            program.compiled.clear()  # whoever holds the program still
            program = program.narrowed(phase.adapters)
            state = carried_over(state, program.abstract_state)
            self.recorder.follow(program)
        self.background.wait()
        self.store.wait()

    def finish_save(self) -> None:
        """After an error: lets the save that was begun last end, and raises nothing.

        Not with several processes: writing a state takes all of them, and the others may have met
        no error.
        """
        if jax.process_count() == 1:
            self.recorder.note_what_is_waited_for()
        with contextlib.suppress(Exception):
            self.store.wait()

    def _steps(self, phase: Phase, program: Program, state: TrainState) -> tuple[TrainState, bool]:
        """The steps of a phase that are left, and whether it was interrupted, which saves.

        What is saved after its last step still holds the adapters that end with it.
        """
        progress, total, stop = self.progress, self.inputs.total_steps, False
        iterators = [self.inputs.train[name].iterator for name in phase.adapters]
        compiled: set[int] = set()
        while progress.step < phase.stop and not stop:
            rows = join_rows([next(iterator) for iterator in iterators])
            batch = program.put_train_batch(rows)
            length, tokens = rows.tokens.shape[1], int((rows.segment_ids > 0).sum())
            if length in compiled:
                state, metrics = program.train_step(state, self.params, batch)
            else:  # compiles first, which is no measure of speed
                compiled.add(length)
                tokens = 0
                with self.recorder.paused():
                    state, metrics = program.train_step(state, self.params, batch)
            progress.step += 1
            self.recorder.push(progress.step, metrics, tokens)
            self.recorder.collect()
            self.background.check()

            stop = self.interrupts.requested(progress.step)
            if self._due(self.config.training.eval_every):
                self._measure(program, state, phase.adapters)
            elif progress.step == phase.stop:
                self._measure(program, state, phase.ending)
            self._ask_between(state, phase.adapters)
            if progress.step == total or stop or self.store.due(progress.step):
                self._save(phase, state)
        self.recorder.drain()
        return state, stop

    def _finish(self, name: str, state: TrainState) -> None:
        """Writes the final folder of an adapter at once: it survives whatever comes later."""
        folder, best = self.work.adapters / name, self.work.best / name
        with self.recorder.paused():
            pictures: dict[str, bytes] = {}
            if is_main_process():
                unit = loss_unit(self.config.adapters[name].method)
                pictures = adapter_pictures(self.work.folder / METRICS_FILE, name, unit)
                # Before the final folder, without which the run counts as not finished.
                if current_folder(best).is_dir():
                    add_pictures(best, pictures)
                elif name in self.progress.best:  # removed by hand; no reason to lose the final one
                    self.say(f"adapter {name!r}: its best weights are no longer in {best}")
            save_adapter(folder, self._saved_adapter(name, state)._replace(pictures=pictures))
        self.say(f"adapter {name!r} finished at step {self.progress.step}; it is in {folder}")

    def _saved_adapter(self, name: str, state: TrainState) -> SavedAdapter:
        """Adapter `name` with all that its folder is to say about it."""
        method = self.config.adapters[name].method
        inputs, progress = self.inputs, self.progress
        record = training_record(
            self.config,
            inputs,
            name,
            step=progress.step,
            validation=progress.validation,
            best=progress.best.get(name),
            training_loss=self.recorder.losses.get(name),
            metrics=self.work.folder / METRICS_FILE,
        )
        tree, step = state.adapters[name], progress.step
        return SavedAdapter(method, tree, inputs.base.config, inputs.base.identity, step, record)

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _measure(self, program: Program, state: TrainState, names: Collection[str]) -> None:
        """Measures validation losses, and keeps each adapter where it is better than before."""
        measured = {name: self.inputs.validation[name] for name in names}
        if not any(measured.values()):
            return
        progress = self.progress
        self.recorder.drain()
        with self.recorder.paused():
            losses, metrics = validate(program, state.adapters, self.params, measured)
        progress.validation |= losses
        self.recorder.validation(progress.step, losses, metrics)
        if not self.config.training.eval_every:
            return  # measured at the end only, where the final adapter is the best
        for name, sets in measured.items():
            if progress.step == 0 and self.config.adapters[name].start_from is None:
                continue  # untrained
            own = [losses[f"{name}/{each}"] for each in sets]
            if own and statistics.fmean(own) < progress.best.get(name, math.inf):
                progress.best[name] = statistics.fmean(own)
                with self.recorder.paused():  # compiles at first
                    adapter = self._saved_adapter(name, state)
                    write = captured_adapter(self.work.best / name, adapter)
                self.background.start(write)

    def _ask_between(self, state: TrainState, names: Collection[str]) -> None:
        """Asks the adapters that it is time for; those that end are asked when all have."""
        progress = self.progress
        for name in names:
            own = self.config.adapters[name].evaluation
            is_due = own is not None and self._due(own.every)
            if self.evaluator is None or not is_due or progress.step == self.inputs.steps[name]:
                continue
            self.recorder.drain()
            try:
                with self.recorder.paused():
                    shares = self.evaluator.measure(
                        name, state.adapters[name], self.params, self.interrupts.noted
                    )
            except Stopped:  # the steps so far are saved soon; half a measurement is none
                return
            self.recorder.evaluation(progress.step, name, shares)

    def _save(self, phase: Phase, state: TrainState) -> None:
        """Begins to save the state as it is now; the device goes on with the steps it has.

        The state is copied on the device, since the next step takes its arrays. It is written once
        the metrics of its own step are there, a few steps later: they belong to it.
        """
        data, progress, step = self.inputs.train, self.progress, self.progress.step
        with self.recorder.paused():  # compiles at first
            captured = capture(state.adapters, _without_adapters(state))
        position = {name: data[name].iterator.get_state() for name in phase.adapters}
        metadata = {
            "base": self.inputs.base.identity._asdict(),
            "data": {name: self.inputs.data_fingerprint(name) for name in data},
            "steps": self.inputs.steps,
            "lengths": lengths(to_plain(self.config)),
            "validation": progress.validation,
            "best": progress.best,
        }
        position, metadata = copy.deepcopy((position, metadata))

        def write() -> None:
            self.background.wait()  # the best, of which this state says how good it is
            if self.background.failed:
                return  # it is not there, and whoever asked before has been told why
            window = {"window": list(self.recorder.window.steps)}
            self.store.write(step, captured, data=position, metadata={**metadata, **window})

        self.recorder.when_noted(step, write)


def restore(store: TrainingStore, program: Program, step: int, inputs: Inputs) -> TrainState:
    """The state that was saved after `step`, on this run's mesh; also moves the data there.

    Args:
      store: the training states.
      program: of the adapters that trained in that step.
      step: which state.
      inputs: whose data is moved.

    Raises:
      CheckpointError: it is damaged, or not that of such a program.
    """
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.abstract_state,
        program.state_shardings,
    )
    saved = store.restore(step, target.adapters, _without_adapters(target))
    for name, state in saved.data.items():
        inputs.train[name].iterator.set_state(state)
    return TrainState(adapters=saved.adapters, **saved.optimizer)


def _without_adapters(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "loss_scale": state.loss_scale}
