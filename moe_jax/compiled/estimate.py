"""Memory and estimated time of a compiled program on one chip."""

from typing import NamedTuple

import jax

from moe_jax.compiled.chips import Chip
from moe_jax.compiled.roofline import Roofline, roofline


class ProgramEstimate(NamedTuple):
    """Memory and kernels of a program on one chip.

    Attributes:
      arguments: bytes of its arguments.
      temporary: bytes of its temporary arrays. Workspaces that cuDNN allocates as it runs are not
        among them.
      peak: bytes of arguments, temporary arrays, and results without the memory of an argument.
      model: kernels, and the estimated time of each.
    """

    arguments: int
    temporary: int
    peak: int
    model: Roofline


def estimate(compiled: jax.stages.Compiled, chip: Chip, dtype: str) -> ProgramEstimate:
    """Reads a compiled program.

    Args:
      compiled: program for a GPU or a TPU.
      chip: the chip.
      dtype: dtype of the products, whose rate the estimate takes.
    """
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return ProgramEstimate(
        arguments=memory.argument_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        peak=memory.argument_size_in_bytes + memory.temp_size_in_bytes + results,
        model=roofline(text, chip.rates_of(dtype)),
    )
