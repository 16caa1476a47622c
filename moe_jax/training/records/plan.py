"""Memory of a run, from the compiled step alone: needs no weights, data or accelerator."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from moe_jax.adapters.method import METHODS
from moe_jax.layers.quantized import QuantizedKernel
from moe_jax.training.step.program import Program


def readable(size: int) -> str:
    """Formats a number of bytes in GiB, or in MiB below 0.1 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def parameter_count(tree: Any) -> int:
    """Number of parameters in a tree of arrays or shapes; a quantized kernel counts unquantized."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedKernel))
    return sum(math.prod(leaf.shape) for leaf in leaves)


class MemoryPlan(NamedTuple):
    """Bytes on one device.

    Attributes:
      params: frozen base parameters.
      adapters: trainable leaves.
      optimizer: state of the optimizer, and counters.
      temporary: peak temporary memory of the compiled step, besides its arguments.
      total: sum of the others.
    """

    params: int
    adapters: int
    optimizer: int
    temporary: int
    total: int

    @property
    def peak(self) -> int:
        """Bytes while a training state is saved, which the device then holds twice."""
        return self.total + self.adapters + self.optimizer


def memory_plan(program: Program, row_length: int) -> MemoryPlan | None:
    """Compiles the training step for rows of `row_length` tokens and reports its memory.

    Returns None if the backend does not report the memory of compiled programs.
    """
    analysis = program.compiled_train_step(row_length).memory_analysis()
    if analysis is None:
        return None
    temporary = analysis.temp_size_in_bytes
    state, shardings = program.abstract_state, program.state_shardings
    params = _bytes_per_device(program.abstract_params, program.param_shardings)
    adapters = _bytes_per_device(state.adapters, shardings.adapters)
    optimizer = _bytes_per_device(state, shardings) - adapters
    total = params + adapters + optimizer + temporary
    return MemoryPlan(params, adapters, optimizer, temporary, total)


def free_memory() -> int | None:
    """Bytes that are free on a device, or on the host for each CPU device; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        return None if limit is None else limit - statistics.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    kibibytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return 1024 * kibibytes // jax.local_device_count()


class ResidentMemory(NamedTuple):
    """Resident memory of this process, in bytes.

    Attributes:
      now: at present.
      peak: largest so far; that of the program alone, unlike `ru_maxrss` of `getrusage`, which a
        process inherits from the one that started it.
    """

    now: int
    peak: int


def resident_memory() -> ResidentMemory | None:
    """Resident memory of this process; None where the system does not say, which Linux does."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
    if not {"VmRSS", "VmHWM"} <= fields.keys():  # some sandboxes state less
        return None
    return ResidentMemory(*(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")))


LIBRARIES_BYTES = int(1.2 * 2**30)
"""Least memory of a process before it has any array, in bytes; see `process_plan`."""


def process_plan(plan: MemoryPlan, program: Program) -> int | None:
    """Bytes that this process will need, if a single CPU device is its host's memory; else None.

    To the peak of the plan comes what the process holds before it has any array: the libraries, the
    compiler's memory and the data, at least `LIBRARIES_BYTES`, as a process that took its program
    from the cache of compiled programs holds less than the next one may. Measured on runs of two
    steps of SmolLM2-135M in float32 (29 November 2026, Linux, jax 0.10.2):

        adapter, rows       plan.peak    held before    sum         resident peak
        LoRA, 4 x 128       1.06 GiB     1.07 GiB       2.13 GiB    2.17 GiB
        MixLoRA, 8 x 256    2.48 GiB     1.18 GiB       3.66 GiB    3.54 GiB

    and on a model of 260,000 parameters, with 0.17 GiB planned, 0.69 to 1.54 GiB.
    """
    held = resident_memory()
    is_host = program.mesh.size == 1 and program.mesh.devices.flat[0].platform == "cpu"
    if not is_host or held is None:
        return None
    return plan.peak + max(held.now, LIBRARIES_BYTES)


def describe_plan(
    program: Program, row_length: int, rank_notes: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Formats `memory_plan` and parameter counts as a table.

    Args:
      program: program of the run.
      row_length: length of the longest rows.
      rank_notes: see `MatchedRanks.notes`.
    """
    plan = memory_plan(program, row_length)
    base = parameter_count(program.abstract_params)
    lines = [
        "mesh            " + " x ".join(f"{n}={s}" for n, s in program.mesh.shape.items()),
        f"base            {base:,} parameters, frozen, {program.config.base.param_dtype}",
    ]
    for name, tree in program.abstract_state.adapters.items():
        method, count = METHODS.name_of(program.config.adapters[name].method), parameter_count(tree)
        share = f"{count / base:.2%} of the base"
        lines.append(f"adapter         {name}: {method}, {count:,} parameters ({share})")
        if name in rank_notes:
            lines.append(f"                {rank_notes[name]}")
    total = sum(rows.total for rows in program.adapter_rows)
    micro = program.config.training.micro_batches
    remat = program.config.compute.remat
    lines += [
        f"step            {total} rows of {row_length} tokens in {micro} micro-batch(es)",
        f"remat           {remat}",
        f"memory of one device, compiled for {program.mesh.devices.flat[0].platform}",
    ]
    if plan is None:
        return "\n".join([*lines, "  not reported by this backend"])
    lines += [f"  {name:<14}{readable(size):>12}" for name, size in plan._asdict().items()]
    process = process_plan(plan, program)
    if process is not None:
        held = readable(process - plan.peak)
        note = f"with {held} of libraries, compiler and data, and a copy of the state to save"
        lines.append(f"  {'process':<14}{readable(process):>12}  {note}")
    return "\n".join(lines)


def _bytes_per_device(tree: Any, shardings: Any) -> int:
    def size(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))
