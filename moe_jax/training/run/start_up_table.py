"""The table that a run prints before its first step."""

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.leaves import leaf_specs, parameters_by_module
from moe_jax.compiled.matrix_rate import MatrixRate
from moe_jax.config.run import RunConfig
from moe_jax.training.records.plan import memory_plan, parameter_count, process_plan, readable
from moe_jax.training.run.inputs import Inputs, phases_of
from moe_jax.training.step.program import Program


def start_up_table(
    config: RunConfig, inputs: Inputs, program: Program, rate: MatrixRate | None = None
) -> list[tuple[str, str]]:
    """Pairs of label and text on the base, adapters, devices, memory and steps of a run.

    Args:
      config: configuration of the run.
      inputs: inputs of the run.
      program: compiled computations of its first phase, or of the one that it resumes in.
      rate: rate of the devices; None if unknown.
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
    if rate is not None:
        table.append(("", f"matrix products: {rate.describe()}"))
    table.append(("attention", program.model.compute.attention))
    plan = memory_plan(program, longest_row(program.config))
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
        tokens = f"{rows} rows{divided}, up to {rows * longest_row(training):,} tokens each"
        if len(phases) == 1:
            return [("steps", f"{phase.stop} of {tokens}")]
        adapters = f"{len(phase.adapters)} adapter{'s' if len(phase.adapters) > 1 else ''}"
        table.append(("steps", f"{phase.start + 1} to {phase.stop} of {tokens}: {adapters}"))
    return [table[0], *(("", text) for _, text in table[1:])]


def longest_row(config: RunConfig) -> int:
    """Tokens of the longest row of the adapters that train."""
    return max(adapter.data.max_length for adapter in config.adapters.values())
