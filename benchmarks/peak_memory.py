"""Peak memory of a process from a point on; needs Python only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SELF = Path("/proc/self")


class PeakMemory:
    """From its making on: of GPUs and TPUs the allocator's account, of CPUs resident memory.

    An allocator's peak is that of the whole process, so that there has to be a process for each
    thing to be measured. Resident memory counts from what there was at first, and with it come
    small differences by what the process had freed, and had not given back, before.
    """

    def __init__(self, devices: Sequence[Any]):
        """Begins to measure.

        Args:
          devices: jax's.
        """
        self._devices = devices
        self._before = None
        if devices[0].platform == "cpu" and _reset_peak():
            self._before = _status_bytes("VmRSS")

    def bytes(self) -> int | None:
        """Of the device that took most; None where neither is known."""
        if self._devices[0].platform == "cpu":
            return None if self._before is None else _status_bytes("VmHWM") - self._before
        peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self._devices]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if known else None


def _reset_peak() -> bool:
    """Resets the high-water mark of resident memory; True if the kernel allows it."""
    try:
        (_SELF / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    lines = (_SELF / "status").read_text(encoding="ascii").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return int(values[field].split()[0]) * 1024
