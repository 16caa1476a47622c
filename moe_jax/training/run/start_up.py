"""Start of a run: what a former one has saved, the start-up table, and the training session."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.checkpoints.adapter_files import load_adapter, read_description
from moe_jax.checkpoints.leaves import leaf_specs, require_same_leaves
from moe_jax.checkpoints.store import TrainingStore, read_metadata
from moe_jax.compiled.matrix_rate import MatrixRate, matrix_rate
from moe_jax.config.run import RunConfig, to_json
from moe_jax.errors import ConfigError, error_prefix
from moe_jax.hf.load import load_base_params
from moe_jax.processes.agreement import require_agreement
from moe_jax.sharding.platform import require_platform
from moe_jax.training.records.console import ProgressBar, stage
from moe_jax.training.records.metric_lines import METRICS_FILE, JsonLines, read_metrics
from moe_jax.training.records.metric_log import (
    Window,
    Writer,
    open_writers,
    require_writers,
    training_losses,
)
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
from moe_jax.training.run.reference_scores import reference_fingerprints, score_answers
from moe_jax.training.run.session import TrainingSession, restore
from moe_jax.training.run.start_up_table import longest_row, start_up_table
from moe_jax.training.run.workdir import (
    WorkDir,
    intact_step,
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
        saved = self.metadata
        return Progress(
            self.step or 0,
            saved.get("validation", {}),
            saved.get("best", {}),
            saved.get("best_accuracy", {}),
            saved.get("unevaluated", ()),
        )


def require_environment(config: RunConfig, task_evaluation: TaskEvaluation | None) -> None:
    """Requires the packages, devices and arguments of a run, before anything is read."""
    require_writers(config.logging)
    if has_evaluation(config) and task_evaluation is None:
        raise ValueError("an adapter has an evaluation on tasks, but task_evaluation is None")
    require_platform(config.compute)


def read_saved_run(
    config: RunConfig,
    work: WorkDir,
    say: Callable[[str], None],
    task_evaluation: TaskEvaluation | None,
) -> SavedRun:
    """Reads the metadata of the training state that the run resumes from.

    Raises:
      ConfigError: the state belongs to another configuration.
      CheckpointError: no training state is intact, or the newest is not and must not be passed by.
    """
    step = intact_step(work.checkpoints, say, fall_back=config.checkpoints.fall_back)
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
    settings = json.loads(to_json(config))
    inputs = _agreed_inputs(config, work, saved, say)
    config, has_steps = inputs.config, saved.step != inputs.total_steps
    phase = phases_after(phases_of(inputs.steps), saved.step or 0)[0]
    program = build_program(config.narrowed(phase.adapters), inputs.base.config, inputs.steps)
    evaluator = None
    if task_evaluation is not None and has_evaluation(config):
        evaluator = task_evaluation.prepare(config, inputs, program)
    rate = None
    if has_steps:
        devices = program.mesh.devices.flatten().tolist()
        rate = matrix_rate(devices, config.compute.dtype, config.logging.matrix_tflops)
    _announce(config, inputs, program, saved, rate, say)
    initial = _load_initial_adapters(program, say) if saved.step is None else {}
    # Before the weights are loaded, since a service may refuse.
    writers, lines = _open_metrics(config, settings, work, saved, say, opened)
    params = _load_base(inputs, program, say)
    if has_steps:  # a run that ends here can go on to its first length
        work.write_settings(settings)
    # Here the processes first compute together. On CPU they must do so within 30 seconds.
    require_agreement({"the base": inputs.base.identity.fingerprint}, say)
    references = _agreed_references(inputs, saved, say)
    if has_steps:
        score_answers(program, inputs, params, references, say)
    checkpoints = config.checkpoints
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
        rate,
    )
    session = TrainingSession(
        config=config,
        inputs=inputs,
        params=params,
        store=store,
        background=background,
        recorder=recorder,
        metric_lines=lines,
        interrupts=interrupts,
        progress=progress,
        work=work,
        say=say,
        references=references,
        evaluator=evaluator,
    )
    return session, program, state


def _agreed_references(
    inputs: Inputs, saved: SavedRun, say: Callable[[str], None]
) -> dict[str, str]:
    """Fingerprints of the references, which are those of the saved state, and equal everywhere."""
    if "references" in saved.metadata:
        return saved.metadata["references"]
    references = reference_fingerprints(inputs)
    require_agreement({"the references of preference data": references}, say)
    return references


def _agreed_inputs(
    config: RunConfig, work: WorkDir, saved: SavedRun, say: Callable[[str], None]
) -> Inputs:
    """Inputs of a run, which are those of its saved state, and the same in all processes."""
    if saved.step is not None:
        config = _ended_at(saved.step, saved.metadata["steps"], config)
    inputs = read_inputs(config, say, resumes=saved.step is not None)
    contents = {
        f"the data of adapter {name!r} ({part})": digest
        for name in inputs.train
        for part, digest in inputs.data_fingerprint(name).items()
    }
    # The hash of all bytes of the base is compared when it is there, after the weights.
    contents["the base"] = inputs.base.content.sample
    require_agreement({**contents, "the number of steps": inputs.steps}, say)
    if saved.step is not None:
        require_same_inputs(work.folder, saved.metadata, inputs.config, inputs, saved.step)
    return inputs


def _open_metrics(
    config: RunConfig,
    settings: dict[str, Any],
    work: WorkDir,
    saved: SavedRun,
    say: Callable[[str], None],
    opened: contextlib.ExitStack,
) -> tuple[list[Writer], JsonLines | None]:
    """All writers of metrics, and the one of `metrics.jsonl`; none in further processes."""
    if not is_main_process():
        return [], None
    # A new run also removes the line of step 0, before training.
    last_kept = -1 if saved.step is None else saved.step
    writers = open_writers(work.folder, config.logging, settings, last_kept, opened)
    lines = JsonLines(work.folder / METRICS_FILE, last_kept, saved.metadata.get("metrics"))
    opened.callback(lines.close)
    if lines.remark is not None:
        say(lines.remark)
    return [*writers, lines], lines


def _load_base(inputs: Inputs, program: Program, say: Callable[[str], None]) -> Any:
    """Weights of the base, on the mesh; their hash is there too."""
    base, settings = inputs.base, inputs.config.base
    with stage(say, f"loading the weights of {settings.path}"):
        params = load_base_params(
            base.folder, base.config, settings.param_dtype, program.param_shardings
        )
        base.require_expected()
        base.content.wait()  # an error of the disk is one before training
    return params


def _announce(
    config: RunConfig,
    inputs: Inputs,
    program: Program,
    saved: SavedRun,
    rate: MatrixRate | None,
    say: Callable[[str], None],
) -> None:
    """Prints the start-up table; without it, what is left of a run that has no step left."""
    if saved.has_ended:
        say(f"training has ended at step {saved.step}; only the evaluation is left")
    elif saved.step == inputs.total_steps:
        say(f"training ends at step {saved.step}, which is saved")
    else:
        length = longest_row(program.config)
        with stage(say, f"compiling the step for rows of {length} tokens"):
            table = start_up_table(config, inputs, program, rate)
        for label, text in table:
            say(f"{label:<12} {text}")


def _ended_at(step: int, former: Mapping[str, int], config: RunConfig) -> RunConfig:
    """The configuration in which adapters with lowered steps end at the saved `step`."""
    adapters = dict(config.adapters)
    for name in lowered_steps(config, former, step):
        adapters[name] = dataclasses.replace(adapters[name], steps=step, epochs=None)
    return dataclasses.replace(config, adapters=adapters)


def _load_initial_adapters(program: Program, say: Callable[[str], None]) -> dict[str, Any]:
    """Loads the adapters in `start_from` by name, onto the mesh of the program.

    Raises:
      CheckpointError: a folder is damaged, or its weights do not fit its method.
      ConfigError: processes have different adapters.
    """
    adapters, checksums = {}, {}
    for name, adapter in program.config.adapters.items():
        if adapter.start_from is None:
            continue
        folder = Path(adapter.start_from).expanduser()
        with error_prefix(f"config.adapters.{name}.start_from"):
            leaves = leaf_specs(program.abstract_state.adapters[name])
            description = read_description(folder)
            require_same_leaves(description.leaves, leaves, str(folder))
            checksums[f"config.adapters.{name}.start_from"] = description.checksums
            adapters[name] = load_adapter(folder, program.state_shardings.adapters[name]).tree
    require_agreement(checksums, say)
    return adapters
