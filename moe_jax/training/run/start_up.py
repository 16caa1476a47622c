"""Start of a run: what a former one has saved, the start-up table, and the training session."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import load_adapter, read_description
from moe_jax.checkpoints.leaves import leaf_specs, parameters_by_module, require_same_leaves
from moe_jax.checkpoints.store import TrainingStore, latest_step, read_metadata
from moe_jax.config.run import RunConfig, to_json
from moe_jax.errors import ConfigError, error_prefix
from moe_jax.hf.load import load_base_params
from moe_jax.sharding.mesh import require_platform
from moe_jax.training.records.console import ProgressBar, stage
from moe_jax.training.records.metric_log import (
    METRICS_FILE,
    Window,
    open_writers,
    read_metrics,
    require_writers,
    training_losses,
)
from moe_jax.training.records.plan import memory_plan, parameter_count, process_plan, readable
from moe_jax.training.records.recorder import Recorder
from moe_jax.training.run.background import BackgroundWriter, Interrupts
from moe_jax.training.run.inputs import (
    Inputs,
    Progress,
    phases_after,
    phases_of,
    read_inputs,
    require_same_inputs,
)
from moe_jax.training.run.measurement import EVALUATION_FOLDER, TaskEvaluation, has_evaluation
from moe_jax.training.run.session import TrainingSession, restore
from moe_jax.training.run.workdir import (
    WorkDir,
    is_main_process,
    lowered_steps,
    require_same_run,
    step_counts,
)
from moe_jax.training.step.program import Program, build_program
from moe_jax.training.step.state import TrainState

MEMORY_ADVICE = (
    "a larger config.training.micro_batches, a smaller batch_size or data.max_length, "
    "config.compute.remat 'narrow' or 'full', or config.base.param_dtype 'nf4'; "
    "train.py --plan says what a step takes"
)


class SavedRun(NamedTuple):
    """State of a work directory before a run.

    Attributes:
      step: step of the latest training state; None without one.
      metadata: metadata of that state.
      has_ended: True if it is the last step and all adapters are written.
      is_complete: True if the final evaluation on tasks is done too.
    """

    step: int | None
    metadata: Mapping[str, Any]
    has_ended: bool
    is_complete: bool

    @property
    def progress(self) -> Progress:
        """Position of the run."""
        validation, best = (self.metadata.get(name, {}) for name in ("validation", "best"))
        return Progress(self.step or 0, validation, best)


def require_environment(config: RunConfig, task_evaluation: TaskEvaluation | None) -> None:
    """Requires the packages, devices and arguments of a run, before anything is read."""
    require_writers(config.logging)
    if has_evaluation(config) and task_evaluation is None:
        raise ValueError("an adapter has an evaluation on tasks, but task_evaluation is None")
    require_platform(config.compute)


def read_saved_run(
    config: RunConfig, work: WorkDir, task_evaluation: TaskEvaluation | None
) -> SavedRun:
    """Reads the latest training state's metadata.

    Raises:
      ConfigError: the state belongs to another configuration.
    """
    step = latest_step(work.checkpoints)
    if step is None:
        return SavedRun(None, {}, has_ended=False, is_complete=False)
    settings, former = json.loads(to_json(config)), work.former_settings()
    if former is None:
        raise ConfigError(
            f"{work.folder}: holds training states but no config.json, so that their configuration "
            "is unknown; give another --workdir"
        )
    require_same_run(former, config, settings, work.folder, step)
    metadata = read_metadata(work.checkpoints, step)
    steps: dict[str, int] = metadata["steps"]
    lowered = lowered_steps(config, steps, step)
    is_same_length = metadata["lengths"] == step_counts(settings)
    if is_same_length or all(name in lowered or count < step for name, count in steps.items()):
        steps = steps | lowered
        has_ended = step == max(steps.values()) and all(
            work.exported_step(name) == count for name, count in steps.items()
        )
    else:
        has_ended = False
    is_evaluated = (
        task_evaluation is None
        or not has_evaluation(config)
        or (has_ended and task_evaluation.is_done(config, steps, work.folder / EVALUATION_FOLDER))
    )
    return SavedRun(step, metadata, has_ended, has_ended and is_evaluated)


def open_session(
    config: RunConfig,
    work: WorkDir,
    saved: SavedRun,
    say: Callable[[str], None],
    task_evaluation: TaskEvaluation | None,
    opened: contextlib.ExitStack,
) -> tuple[TrainingSession, Program, TrainState]:
    """Reads the inputs and weights of a run and opens what its loop needs.

    Args:
      config: configuration of the run.
      work: work directory.
      saved: what `work` holds.
      say: prints a line.
      task_evaluation: evaluates adapters on tasks.
      opened: closes the files and threads of the session.
    """
    resumes, settings = saved.step is not None, json.loads(to_json(config))
    if saved.step is not None:
        config = _ended_at(saved.step, saved.metadata["steps"], config)
    inputs = read_inputs(config, say, resumes=resumes)
    config = inputs.config
    if saved.step is not None:
        require_same_inputs(work.folder, saved.metadata, config, inputs, saved.step)
    phase = phases_after(phases_of(inputs.steps), saved.step or 0)[0]
    program = build_program(config.narrowed(phase.adapters), inputs.base.config, inputs.steps)
    evaluator = None
    if task_evaluation is not None and has_evaluation(config):
        evaluator = task_evaluation.prepare(config, inputs, program)
    _announce(config, inputs, program, saved, say)
    initial = {} if resumes else _load_initial_adapters(program)
    writers = []
    if is_main_process():  # before the weights are loaded, since a service may refuse
        # A new run also removes the line of step 0, before training.
        last_kept = -1 if saved.step is None else saved.step
        writers = open_writers(work.folder, config.logging, settings, last_kept, opened)

    base, checkpoints = inputs.base, config.checkpoints
    with stage(say, f"loading the weights of {config.base.path}"):
        params = load_base_params(
            base.folder, base.config, config.base.param_dtype, program.param_shardings
        )
    if saved.step != inputs.total_steps:  # a run that ends here can go on to its first length
        work.write_settings(settings)
    store = TrainingStore(work.checkpoints, every=checkpoints.every, keep=checkpoints.keep)
    opened.enter_context(store)
    background = opened.enter_context(BackgroundWriter())
    interrupts = opened.enter_context(Interrupts())
    if saved.step is None:
        state = program.init_state(params, initial)
    else:
        state = restore(store, program, saved.step, inputs)
        say(f"resumed at step {saved.step}")
    progress = saved.progress
    recorder = Recorder(
        program,
        inputs.steps,
        writers,
        Window(saved.metadata.get("window")),
        say,
        ProgressBar(inputs.total_steps, progress.step, show=None if is_main_process() else False),
        training_losses(read_metrics(work.folder / METRICS_FILE, missing_ok=True)),
    )
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
    return session, program, state


def _announce(
    config: RunConfig, inputs: Inputs, program: Program, saved: SavedRun, say: Callable[[str], None]
) -> None:
    """Prints the start-up table; without it, what is left of a run that has no step left."""
    if saved.has_ended:
        say(f"training has ended at step {saved.step}; only the evaluation is left")
    elif saved.step == inputs.total_steps:
        say(f"training ends at step {saved.step}, which is saved")
    else:
        length = _longest_row(program.config)
        with stage(say, f"compiling the step for rows of {length} tokens"):
            table = start_up_table(config, inputs, program)
        for label, text in table:
            say(f"{label:<12} {text}")


def _ended_at(step: int, former: Mapping[str, int], config: RunConfig) -> RunConfig:
    """The configuration in which adapters with lowered steps end at the saved `step`."""
    adapters = dict(config.adapters)
    for name in lowered_steps(config, former, step):
        adapters[name] = dataclasses.replace(adapters[name], steps=step, epochs=None)
    return dataclasses.replace(config, adapters=adapters)


def _load_initial_adapters(program: Program) -> dict[str, Any]:
    """Loads the adapters in `start_from` by name, onto the mesh of the program.

    Raises:
      CheckpointError: a folder is damaged, or its weights do not fit its method.
    """
    adapters = {}
    for name, adapter in program.config.adapters.items():
        if adapter.start_from is None:
            continue
        folder = Path(adapter.start_from).expanduser()
        with error_prefix(f"config.adapters.{name}.start_from"):
            leaves = leaf_specs(program.abstract_state.adapters[name])
            require_same_leaves(read_description(folder).leaves, leaves, str(folder))
            adapters[name] = load_adapter(folder, program.state_shardings.adapters[name]).tree
    return adapters


def start_up_table(config: RunConfig, inputs: Inputs, program: Program) -> list[tuple[str, str]]:
    """Pairs of label and text on the base, adapters, devices, memory and steps of a run.

    Args:
      config: configuration of the run.
      inputs: inputs of the run.
      program: compiled computations of its first phase, or of the one that it resumes in.
    """
    model, frozen = inputs.base.config, parameter_count(program.abstract_params)
    size = f"{model.num_layers} layers, width {model.hidden_size}, {frozen:,} parameters"
    types = f"kept in {config.base.param_dtype}, computed in {config.compute.dtype}"
    table = [("base", f"{config.base.path}: {size}, {types}")]
    if inputs.base.unread_note is not None:
        table.append(("", inputs.base.unread_note))
    for name, adapter in config.adapters.items():
        method, steps = METHODS.name_of(adapter.method), inputs.steps[name]
        tree = program.abstract_state.adapters.get(name)
        if tree is None:
            table.append(("adapter", f"{name!r}: {method}, finished at step {steps}"))
            continue
        count = parameter_count(tree)
        trainable = f"{count:,} trainable parameters ({count / frozen:.3%} of the base)"
        length = f", {steps} steps of {adapter.batch_size} rows" if len(inputs.steps) > 1 else ""
        table.append(("adapter", f"{name!r}: {method}, {trainable}{length}"))
        if name in inputs.rank_notes:
            table.append(("", inputs.rank_notes[name]))
        modules = parameters_by_module(leaf_specs(tree)).items()
        table.append(("", "on " + ", ".join(f"{module} ({size:,})" for module, size in modules)))
        longest, positions = adapter.data.max_length, model.max_position_embeddings
        if longest > positions:
            limit = f"the {positions:,} positions of the base"
            table.append(("", f"its data.max_length of {longest:,} exceeds {limit}"))
    mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    kind = program.mesh.devices.flat[0].device_kind
    table.append(("devices", f"{program.mesh.size} x {kind} ({mesh})"))
    plan = memory_plan(program, _longest_row(program.config))
    if plan is None:
        table.append(("memory", "not reported by this backend"))
    else:
        sizes = {name: readable(size) for name, size in plan._asdict().items()}
        total = sizes.pop("total")
        terms = ", ".join(f"{name} {size}" for name, size in sizes.items())
        table.append(("memory", f"{total} a device, compiled: {terms}"))
        process = process_plan(plan, program)
        if process is not None:
            table.append(("", f"about {readable(process)} for the whole process"))
    return [*table, *_step_rows(config, inputs)]


def _step_rows(config: RunConfig, inputs: Inputs) -> list[tuple[str, str]]:
    """Table rows on the steps and batch of each phase."""
    count = config.training.micro_batches
    divided = f" in {count} micro-batches" if count > 1 else ""
    phases, table = phases_of(inputs.steps), []
    for phase in phases:
        training = config.narrowed(phase.adapters)
        rows = sum(adapter.batch_size for adapter in training.adapters.values())
        tokens = f"{rows} rows{divided}, up to {rows * _longest_row(training):,} tokens each"
        if len(phases) == 1:
            return [("steps", f"{phase.stop} of {tokens}")]
        adapters = f"{len(phase.adapters)} adapter{'s' if len(phase.adapters) > 1 else ''}"
        table.append(("steps", f"{phase.start + 1} to {phase.stop} of {tokens}: {adapters}"))
    return [table[0], *(("", text) for _, text in table[1:])]


def _longest_row(config: RunConfig) -> int:
    return max(adapter.data.max_length for adapter in config.adapters.values())
