"""Plan of a step on a chip that it was only compiled for: memory, kernels and estimated time."""

from typing import NamedTuple

from moe_jax.compiled.chips import chip_named
from moe_jax.compiled.estimate import ProgramEstimate, estimate
from moe_jax.compiled.target import compiler_version
from moe_jax.training.records.plan import readable
from moe_jax.training.step.needed_flops import needed_flops
from moe_jax.training.step.program import Program


class ChipPlan(NamedTuple):
    """Estimate of a training step on full rows.

    Attributes:
      program: what the program takes of one chip.
      needed_flops: FLOPs that the model needs on one chip; see
        `moe_jax.training.step.needed_flops`.
      tokens: tokens of the step on all chips.
    """

    program: ProgramEstimate
    needed_flops: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Estimated tokens/s of all chips."""
        return self.tokens / self.program.model.total.seconds

    def mfu(self, peak: float) -> float:
        """Estimated share of a chip's peak FLOP/s that the needed FLOPs take."""
        return self.needed_flops / self.program.model.total.seconds / peak


def chip_plan(program: Program, row_length: int, chip_name: str) -> ChipPlan:
    """Compiles the training step for rows of `row_length` tokens and estimates its time.

    Args:
      program: program whose mesh is of `target_devices(chip_name)`.
      row_length: number of tokens of a row.
      chip_name: name of the chip.
    """
    config, chip = program.config, chip_named(chip_name)
    compiled = program.compiled_train_step(row_length)
    adapters = program.abstract_state.adapters
    needed = needed_flops(program.model.config, config.methods, adapters, config.preferences)
    rows = {rows.name: rows.total for rows in program.adapter_rows}
    return ChipPlan(
        program=estimate(compiled, chip, config.compute.dtype),
        needed_flops=needed.of_full_rows(rows, row_length) / program.mesh.size,
        tokens=sum(rows.values()) * row_length,
    )


def describe_chip_plan(program: Program, row_length: int, chip_name: str) -> str:
    """Formats `chip_plan` as a table."""
    chip, dtype = chip_named(chip_name), program.config.compute.dtype
    plan = chip_plan(program, row_length, chip_name)
    memory, total = plan.program.memory, plan.program.model.total
    kind, devices = program.mesh.devices.flat[0].device_kind, program.mesh.size
    fits = "" if memory.peak <= chip.memory_bytes else ": the step does not fit"
    share = f"{memory.peak / chip.memory_bytes:.0%} of {readable(chip.memory_bytes)}{fits}"
    chips = "" if devices == 1 else f" of {devices}"
    speed = f"tokens/s estimated, MFU {plan.mfu(chip.peak(dtype)):.0%}"
    rows = [
        ("arguments", readable(memory.arguments), ""),
        ("temporary", readable(memory.temporary), ""),
        ("peak", readable(memory.peak), share),
        ("kernels", f"{total.kernels:,}", "launches a step"),
        ("moved", f"{total.moved / 1e9:,.1f} GB", "read and written"),
        ("products", _flops(total.flops), f"of which the model needs {_flops(plan.needed_flops)}"),
        ("step", f"{total.seconds * 1e3:,.1f} ms", "estimated"),
        ("speed", f"{plan.tokens_per_second:,.0f}", speed),
    ]
    lines = [
        f"step on one{chips} {kind}, compiled by {compiler_version(chip.platform)}, not run",
        *(f"  {name:<14}{value:>12}  {note}".rstrip() for name, value, note in rows),
        "The time is an estimate: each kernel at the rates of large ones, one after another.",
    ]
    unknown = plan.program.model.unknown_loops
    if unknown:
        lines.append(f"{unknown} loops of unknown length are counted as one round.")
    return "\n".join(lines)


def _flops(flops: float) -> str:
    return f"{flops / 1e12:.4g} TFLOP"
