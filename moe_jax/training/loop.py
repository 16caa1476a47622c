"""A training run from start to end: `train` reads from top to bottom."""

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import SavedAdapter, save_adapter
from moe_jax.checkpoints.base import load_base
from moe_jax.checkpoints.store import TrainingStore, latest_step, read_metadata
from moe_jax.config.run import RunConfig, to_json
from moe_jax.data.pipeline import TrainData
from moe_jax.errors import ConfigError, TrainingError
from moe_jax.training.inputs import Inputs, read_inputs, require_same_inputs
from moe_jax.training.interrupts import Interrupts
from moe_jax.training.metrics import Window, open_writers, require_writers
from moe_jax.training.program import Program, build_program
from moe_jax.training.recorder import Recorder
from moe_jax.training.rows import join_rows
from moe_jax.training.state import TrainState
from moe_jax.training.summary import start_up_table
from moe_jax.training.validation import validation_losses
from moe_jax.training.workdir import WorkDir, is_main_process, require_same_run


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      step: optimiser steps done, over all resumptions.
      total_steps: those that the configuration asks for.
      adapters: the final folder of each adapter; empty if the run was interrupted.
      validation: the last measured losses, by `adapter/set`.
      interrupted_by: the signal that stopped the run before its end, after saving.
      did_nothing: the run had already ended before.
    """

    step: int
    total_steps: int
    adapters: dict[str, Path]
    validation: dict[str, float] = field(default_factory=dict)
    interrupted_by: signal.Signals | None = None
    did_nothing: bool = False


def train(config: RunConfig, workdir: Path, say: Callable[[str], None] = print) -> TrainResult:
    """Trains the adapters of `config`; resumes if `workdir` holds training states of the same run.

    A resumed run ends with the same adapters, bit for bit, as one that was never interrupted, on
    the same number of devices.

    Args:
      config: the whole configuration.
      workdir: gets `config.json`, `metrics.jsonl`, `checkpoints/` and, at the end, `adapters/NAME`.
      say: takes the lines for people; only called in the main process.

    Raises:
      UserError: the configuration, the base, the data, the devices or the disk will not do.
    """
    say = say if is_main_process() else lambda _: None
    require_writers(config.logging)
    settings = json.loads(to_json(config, METHODS))
    with WorkDir(workdir) as work:
        resume_step = latest_step(work.checkpoints)
        metadata = {}
        if resume_step is not None:
            _require_same_settings(work, config, settings)
            metadata = read_metadata(work.checkpoints, resume_step)
            if _ended(work, config, resume_step, metadata):
                say(f"already finished at step {resume_step}; nothing to do")
                folders = {name: work.adapters / name for name in config.adapters}
                return TrainResult(
                    resume_step, resume_step, folders, metadata["validation"], did_nothing=True
                )

        inputs = read_inputs(config, say)
        if resume_step is not None:
            require_same_inputs(work.folder, metadata, inputs, resume_step)
        program = build_program(config, inputs.model, inputs.total_steps)
        for label, text in start_up_table(config, inputs.model, program, inputs.total_steps):
            say(f"{label:<12} {text}")

        params = load_base(
            inputs.base_folder, inputs.model, config.base.param_dtype, program.param_shardings
        )
        work.write_settings(settings)
        store = TrainingStore(
            work.checkpoints, every=config.checkpoints.every, keep=config.checkpoints.keep
        )
        with store, Interrupts() as interrupts:
            if resume_step is None:
                state = program.init_state()
            else:
                state = _restore(store, program, resume_step, inputs.train)
                say(f"resumed at step {resume_step}")
            writers = []
            if is_main_process():
                writers = open_writers(work.folder, config.logging, settings, resume_step or 0)
            recorder = Recorder(
                program, inputs.total_steps, writers, Window(metadata.get("window")), say
            )
            progress = _Progress(resume_step or 0, metadata.get("validation", {}))
            try:
                state = _run(
                    config, program, inputs, params, state, store, recorder, interrupts, progress
                )
            except TrainingError as error:
                store.wait()
                raise TrainingError(f"{error}; {store.kept()}") from None
            for writer in writers:
                writer.close()

            result = TrainResult(
                progress.step, inputs.total_steps, {}, progress.validation, interrupts.received
            )
            if progress.step < inputs.total_steps:
                say(f"saved at step {progress.step}; run the same command to resume")
                return result
            for name, adapter in config.adapters.items():
                saved = SavedAdapter(
                    adapter.method, state.adapters[name], inputs.model, inputs.base, progress.step
                )
                save_adapter(work.adapters / name, saved)
                result.adapters[name] = work.adapters / name
                say(f"adapter {name!r} is in {work.adapters / name}")
            return result


@dataclass
class _Progress:
    """What changes besides the state, and is saved with it."""

    step: int
    validation: dict[str, float]


def _run(
    config: RunConfig,
    program: Program,
    inputs: Inputs,
    params: Any,
    state: TrainState,
    store: TrainingStore,
    recorder: Recorder,
    interrupts: Interrupts,
    progress: _Progress,
) -> TrainState:
    """Steps until the end or until interrupted; the state it returns is saved."""
    iterators = [inputs.train[name].iterator for name in config.adapters]
    measure = any(inputs.validation.values())
    lengths: set[int] = set()

    while progress.step < inputs.total_steps:
        rows = join_rows([next(iterator) for iterator in iterators])
        batch = program.put_train_batch(rows)
        length, tokens = rows.tokens.shape[1], int((rows.segment_ids > 0).sum())
        if length in lengths:
            state, metrics = program.train_step(state, params, batch)
        else:  # compiles first
            lengths.add(length)
            tokens = 0
            with recorder.paused():
                state, metrics = program.train_step(state, params, batch)
        progress.step += 1
        recorder.push(progress.step, metrics, tokens)
        recorder.collect()

        last = progress.step == inputs.total_steps
        stop = interrupts.requested(progress.step)
        if measure and (last or _due(progress.step, config.training.eval_every)):
            recorder.drain()
            with recorder.paused():
                progress.validation = validation_losses(
                    program, state.adapters, params, inputs.validation
                )
            recorder.validation(progress.step, progress.validation)
        if last or stop or store.due(progress.step):
            recorder.drain()
            with recorder.paused():
                _save(store, state, inputs, recorder, progress)
        if stop:
            break
    store.wait()
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(
    store: TrainingStore,
    state: TrainState,
    inputs: Inputs,
    recorder: Recorder,
    progress: _Progress,
) -> None:
    store.save(
        progress.step,
        adapters=state.adapters,
        optimizer=_without_adapters(state),
        data={name: data.iterator.get_state() for name, data in inputs.train.items()},
        metadata={
            "base": inputs.base._asdict(),
            "data": {name: data.fingerprint for name, data in inputs.train.items()},
            "total_steps": inputs.total_steps,
            "window": recorder.window.steps,
            "validation": progress.validation,
        },
    )


def _restore(
    store: TrainingStore, program: Program, step: int, train_data: Mapping[str, TrainData]
) -> TrainState:
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.abstract_state,
        program.state_shardings,
    )
    saved = store.restore(step, target.adapters, _without_adapters(target))
    for name, data in train_data.items():
        data.iterator.set_state(saved.data[name])
    return TrainState(adapters=saved.adapters, **saved.optimizer)


def _without_adapters(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "loss_scale": state.loss_scale}


def _require_same_settings(work: WorkDir, config: RunConfig, settings: dict[str, Any]) -> None:
    former = work.former_settings()
    if former is None:
        raise ConfigError(
            f"{work.folder}: holds training states but no config.json, so it is unclear what they "
            "are; give another --workdir"
        )
    require_same_run(former, config, settings, work.folder)


def _ended(work: WorkDir, config: RunConfig, step: int, metadata: Mapping[str, Any]) -> bool:
    """Whether the run reached its last step and left all its adapters."""
    former = work.former_settings() or {}
    length = {"steps": config.training.steps, "epochs": config.training.epochs}
    same_length = all(former.get("training", {}).get(key) == length[key] for key in length)
    return (
        same_length
        and step == metadata["total_steps"]
        and all(work.exported_step(name) == step for name in config.adapters)
    )
