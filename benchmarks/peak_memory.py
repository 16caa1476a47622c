"""Peak memory of a process since a point in time. Needs Python only."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SELF = Path("/proc/self")


class PeakMemory:
    """Peak memory since construction: allocated memory of GPUs and TPUs, resident memory of CPUs.

    The allocator's peak is that of the whole process, so each measurement needs a new process.
    The increase of resident memory is reported; it can differ slightly if the process had freed
    memory earlier without returning it to the system.
    """

    def __init__(self, devices: Sequence[Any]):
        """Starts the measurement.

        Args:
          devices: devices of jax.
        """
        self._devices = devices
        self._before = None
        if devices[0].platform == "cpu" and _reset_peak():
            self._before = _status_bytes("VmRSS")

    def bytes(self) -> int | None:
        """Peak of the device with the highest peak, in bytes; None if unknown."""
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
