"""What a run is about to do, as a table."""

import collections
from typing import Any

import numpy as np

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.model import ModelConfig
from moe_jax.config.run import RunConfig
from moe_jax.training.plan import memory_plan, parameter_count, readable
from moe_jax.training.program import Program


def start_up_table(
    config: RunConfig, model: ModelConfig, program: Program, total_steps: int
) -> list[tuple[str, str]]:
    """Pairs of a label and a text: base, adapters and what they matched, devices, steps."""
    frozen = parameter_count(program.abstract_params)
    size = f"{model.num_layers} layers, width {model.hidden_size}, {frozen:,} parameters"
    types = f"kept in {config.base.param_dtype}, computed in {config.compute.dtype}"
    table = [("base", f"{config.base.path}: {size}, {types}")]
    for name, adapter in config.adapters.items():
        tree = program.abstract_state.adapters[name]
        count = parameter_count(tree)
        trainable = f"{count:,} trainable parameters ({count / frozen:.3%} of the base)"
        table.append(("adapter", f"{name!r}: {METHODS.name_of(adapter.method)}, {trainable}"))
        table.append(("", f"on {_modules(tree)}"))
    mesh = ", ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items())
    kind = program.mesh.devices.flat[0].device_kind
    table.append(("devices", f"{program.mesh.size} x {kind} ({mesh})"))
    rows = program.segments[-1].stop
    longest = max(adapter.data.max_length for adapter in config.adapters.values())
    parts = config.training.micro_batches
    cut = f" in {parts} micro-batches" if parts > 1 else ""
    plan = memory_plan(program, longest)
    if plan is None:
        table.append(("memory", "not reported by this backend"))
    else:
        sizes = {name: readable(size) for name, size in plan._asdict().items()}
        total = sizes.pop("total")
        parts_of_it = ", ".join(f"{name} {size}" for name, size in sizes.items())
        table.append(("memory", f"{total} a device, compiled: {parts_of_it}"))
    table.append(
        ("steps", f"{total_steps} of {rows} rows{cut}, up to {rows * longest:,} tokens each")
    )
    return table


def _modules(tree: Any) -> str:
    """The modules that hold adapter weights, each with its number of weights."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in named_leaves(tree).items():
        parts = [part for part in path.split("/")[:-1] if part != "layers"]
        counts["/".join(parts)] += int(np.prod(leaf.shape))
    return ", ".join(f"{module} ({count:,})" for module, count in counts.items())
