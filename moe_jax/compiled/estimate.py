"""Memory and estimated time of a compiled program on one chip."""

from typing import NamedTuple

import jax

from moe_jax.compiled.chips import Chip
from moe_jax.compiled.roofline import Roofline, roofline


class ProgramMemory(NamedTuple):
    """Memory of a program on one chip, in bytes.

    Attributes:
      arguments: its arguments.
      temporary: its temporary arrays. Workspaces that cuDNN allocates as it runs are not among
        them.
      peak: arguments, temporary arrays, and results without the memory of an argument.
    """

    arguments: int
    temporary: int
    peak: int


class ProgramEstimate(NamedTuple):
    """Memory and kernels of a program on one chip.

    Attributes:
      memory: its memory.
      model: kernels, and the estimated time of each.
    """

    memory: ProgramMemory
    model: Roofline


def program_memory(compiled: jax.stages.Compiled) -> ProgramMemory:
    """Memory of a compiled program."""
    memory = compiled.memory_analysis()
    assert memory is not None
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return ProgramMemory(arguments, temporary, arguments + temporary + results)


def estimate(compiled: jax.stages.Compiled, chip: Chip, dtype: str) -> ProgramEstimate:
    """Reads a compiled program.

    Args:
      compiled: program for a GPU or a TPU.
      chip: the chip.
      dtype: dtype of the products, whose rate the estimate takes.
    """
    text = compiled.as_text()
    assert text is not None
    return ProgramEstimate(program_memory(compiled), roofline(text, chip.rates_of(dtype)))
