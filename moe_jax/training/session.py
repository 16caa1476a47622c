"""The steps of a run, with what happens between them: measuring, recording, saving, stopping."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from moe_jax.checkpoints.adapter_files import SavedAdapter, save_adapter
from moe_jax.checkpoints.store import TrainingStore
from moe_jax.config.run import RunConfig
from moe_jax.training.inputs import Inputs
from moe_jax.training.interrupts import Interrupts
from moe_jax.training.program import Program
from moe_jax.training.recorder import Recorder
from moe_jax.training.rows import join_rows
from moe_jax.training.state import TrainState
from moe_jax.training.validation import validation_losses


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
class Session:
    """Everything that the steps of a run need.

    Attributes:
      config: the run's configuration.
      inputs: base, data and length.
      program: the compiled computations.
      params: the frozen base.
      store: the training states.
      recorder: takes the metrics.
      interrupts: says when to stop early.
      progress: where the run stands; changed in place.
      best: the folder of each adapter as it was at its lowest validation loss.
    """

    config: RunConfig
    inputs: Inputs
    program: Program
    params: Any
    store: TrainingStore
    recorder: Recorder
    interrupts: Interrupts
    progress: Progress
    best: Path

    def run(self, state: TrainState) -> TrainState:
        """Steps until the end, or until interrupted; the state that it returns is saved."""
        progress, total = self.progress, self.inputs.total_steps
        iterators = [self.inputs.train[name].iterator for name in self.config.adapters]
        lengths: set[int] = set()
        if progress.step == 0:
            self._measure(state)  # an untrained adapter is the base as it is: what to compare with
        while progress.step < total:
            rows = join_rows([next(iterator) for iterator in iterators])
            batch = self.program.put_train_batch(rows)
            length, tokens = rows.tokens.shape[1], int((rows.segment_ids > 0).sum())
            if length in lengths:
                state, metrics = self.program.train_step(state, self.params, batch)
            else:  # compiles first, which is no measure of speed
                lengths.add(length)
                tokens = 0
                with self.recorder.paused():
                    state, metrics = self.program.train_step(state, self.params, batch)
            progress.step += 1
            self.recorder.push(progress.step, metrics, tokens)
            self.recorder.collect()

            last = progress.step == total
            stop = self.interrupts.requested(progress.step)
            if last or self._due(self.config.training.eval_every):
                self._measure(state)
            if last or stop or self.store.due(progress.step):
                self._save(state)
            if stop:
                break
        self.store.wait()
        return state

    def saved_adapter(self, name: str, state: TrainState) -> SavedAdapter:
        """Adapter `name` with all that its folder is to say about it."""
        method = self.config.adapters[name].method
        inputs, step = self.inputs, self.progress.step
        return SavedAdapter(method, state.adapters[name], inputs.model, inputs.base, step)

    def _due(self, every: int) -> bool:
        return every > 0 and self.progress.step % every == 0

    def _measure(self, state: TrainState) -> None:
        """Measures the validation losses, and keeps each adapter where it is better than before."""
        if not any(self.inputs.validation.values()):
            return
        progress = self.progress
        self.recorder.drain()
        with self.recorder.paused():
            progress.validation = validation_losses(
                self.program, state.adapters, self.params, self.inputs.validation
            )
        self.recorder.validation(progress.step, progress.validation)
        if not self.config.training.eval_every or progress.step == 0:
            return  # measured at the end only, where the final adapter is the best; or untrained
        for name, sets in self.inputs.validation.items():
            losses = [progress.validation[f"{name}/{each}"] for each in sets]
            if losses and statistics.fmean(losses) < progress.best.get(name, math.inf):
                progress.best[name] = statistics.fmean(losses)
                with self.recorder.paused():
                    save_adapter(self.best / name, self.saved_adapter(name, state))

    def _save(self, state: TrainState) -> None:
        self.recorder.drain()
        data, progress = self.inputs.train, self.progress
        with self.recorder.paused():
            self.store.save(
                progress.step,
                adapters=state.adapters,
                optimizer=_without_adapters(state),
                data={name: each.iterator.get_state() for name, each in data.items()},
                metadata={
                    "base": self.inputs.base._asdict(),
                    "data": {name: self.inputs.data_fingerprint(name) for name in data},
                    "total_steps": self.inputs.total_steps,
                    "window": self.recorder.window.steps,
                    "validation": progress.validation,
                    "best": progress.best,
                },
            )


def restore(store: TrainingStore, program: Program, step: int, inputs: Inputs) -> TrainState:
    """The state that was saved after `step`, on this run's mesh; also moves the data there.

    Raises:
      CheckpointError: it is damaged, or not that of such a program.
    """
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.abstract_state,
        program.state_shardings,
    )
    saved = store.restore(step, target.adapters, _without_adapters(target))
    for name, data in inputs.train.items():
        data.iterator.set_state(saved.data[name])
    return TrainState(adapters=saved.adapters, **saved.optimizer)


def _without_adapters(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "loss_scale": state.loss_scale}
