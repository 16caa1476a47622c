"""The stretches of a run between two steps at which adapters end."""

from collections.abc import Mapping
from typing import NamedTuple


class Phase(NamedTuple):
    """Steps that are all made with the same adapters.

    Attributes:
      start: how many steps were made before it.
      stop: how many are made at its end.
      adapters: those that train in it.
      ending: those of them whose last step is the phase's last.
    """

    start: int
    stop: int
    adapters: tuple[str, ...]
    ending: tuple[str, ...]


def phases_of(steps: Mapping[str, int]) -> tuple[Phase, ...]:
    """The phases of a run whose adapters all begin at once.

    Args:
      steps: how many steps each adapter makes, in the order of the batch's segments.
    """
    phases, start = [], 0
    for stop in sorted(set(steps.values())):
        adapters = tuple(name for name, count in steps.items() if count >= stop)
        ending = tuple(name for name, count in steps.items() if count == stop)
        phases.append(Phase(start, stop, adapters, ending))
        start = stop
    return tuple(phases)


def phase_after(phases: tuple[Phase, ...], step: int) -> Phase:
    """The phase that step `step` was made in, also where it is the last one; of none, the first.

    The state after that step still holds the adapters that end with it.
    """
    return next(phase for phase in phases if step <= phase.stop)
