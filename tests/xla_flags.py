"""Flags of XLA for programs that are compiled fast rather than run fast.

Compiling takes most of the tests' time, and what is compiled runs for milliseconds. The operations
that XLA counts, and the memory that it plans, are those before the stages that this is about.
"""

from importlib.metadata import version

FAST_COMPILATION = ["--xla_backend_optimization_level=0"]
# The older of two emitters of fused loops takes a quarter of the newer one's time. Other releases
# may not know the flag, and XLA ends a process for a flag that it does not know.
if version("jaxlib").startswith("0.10."):
    FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")


def xla_flags(devices: int) -> str:
    """XLA flags for `devices` fake devices."""
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *FAST_COMPILATION])
