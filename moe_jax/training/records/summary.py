"""What a run is about to do, as a table."""

import collections
from typing import Any

import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.run import RunConfig
from moe_jax.training.records.plan import memory_plan, parameter_count, readable
from moe_jax.training.run.inputs import Inputs
from moe_jax.training.run.phases import phases_of
from moe_jax.training.step.program import Program


def start_up_table(config: RunConfig, inputs: Inputs, program: Program) -> list[tuple[str, str]]:
    """Pairs of a label and a text: base, adapters and what they matched, devices, steps.

    Args:
      config: the run's configuration.
      inputs: what it read.
      program: of the phase that it begins or goes on with.
    """
    model, frozen = inputs.model, parameter_count(program.abstract_params)
    size = f"{model.num_layers} layers, width {model.hidden_size}, {frozen:,} parameters"
    types = f"kept in {config.base.param_dtype}, computed in {config.compute.dtype}"
    table = [("base", f"{config.base.path}: {size}, {types}")]
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
        table.append(("", f"on {_modules(tree)}"))
        if adapter.data.max_length > model.max_position_embeddings:
            longest, known = adapter.data.max_length, model.max_position_embeddings
            beyond = f"beyond the {known:,} positions that the base was made for"
            table.append(("", f"its data.max_length of {longest:,} is {beyond}"))
    mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    kind = program.mesh.devices.flat[0].device_kind
    table.append(("devices", f"{program.mesh.size} x {kind} ({mesh})"))
    plan = memory_plan(program, _longest(program.config))
    if plan is None:
        table.append(("memory", "not reported by this backend"))
    else:
        sizes = {name: readable(size) for name, size in plan._asdict().items()}
        total = sizes.pop("total")
        parts_of_it = ", ".join(f"{name} {size}" for name, size in sizes.items())
        table.append(("memory", f"{total} a device, compiled: {parts_of_it}"))
    return [*table, *_steps(config, inputs)]


def _steps(config: RunConfig, inputs: Inputs) -> list[tuple[str, str]]:
    """How long the run is, and the rows of each of its phases."""
    parts = config.training.micro_batches
    cut = f" in {parts} micro-batches" if parts > 1 else ""
    phases, table = phases_of(inputs.steps), []
    for phase in phases:
        own = config.narrowed(phase.adapters)
        rows = sum(adapter.batch_size for adapter in own.adapters.values())
        tokens = f"{rows} rows{cut}, up to {rows * _longest(own):,} tokens each"
        if len(phases) == 1:
            return [("steps", f"{phase.stop} of {tokens}")]
        count = len(phase.adapters)
        whose = f"{count} adapter{'s' if count > 1 else ''}"
        table.append(("steps", f"{phase.start + 1} to {phase.stop} of {tokens}: {whose}"))
    return [table[0], *(("", text) for _, text in table[1:])]


def _longest(config: RunConfig) -> int:
    return max(adapter.data.max_length for adapter in config.adapters.values())


def _modules(tree: Any) -> str:
    """The modules that hold adapter weights, each with its number of weights."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in named_leaves(tree).items():
        parts = [part for part in path.split("/")[:-1] if part != "layers"]
        counts["/".join(parts)] += int(np.prod(leaf.shape))
    return ", ".join(f"{module} ({count:,})" for module, count in counts.items())
