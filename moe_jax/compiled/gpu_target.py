"""Description of a GPU for XLA's compiler, the message `GpuTargetConfigProto` as text."""

from moe_jax.compiled.chips import Chip

CUDNN_VERSION = (9, 20, 0)
"""Version of cuDNN that programs for absent GPUs may count on."""

_CUDA_VERSION = "13.0.0"
_ARCHITECTURE_FEATURES = " feature_extension: ACCELERATED_FEATURES"


def gpu_target(chip: Chip) -> str:
    """The message that describes one GPU.

    The limits that are written out here are common to compute capabilities 8.0 and 9.0 in the CUDA
    programming guide.

    Args:
      chip: a GPU.
    """
    assert chip.gpu is not None
    limits, (name, *_) = chip.gpu, chip.kinds
    major, minor = limits.capability
    features = _ARCHITECTURE_FEATURES if limits.accelerated else ""
    cudnn_major, cudnn_minor, cudnn_patch = CUDNN_VERSION
    cudnn = f"major: {cudnn_major} minor: {cudnn_minor} patch: {cudnn_patch}"
    return f"""
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ {cudnn} }}
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  core_count: {limits.cores}
  fpus_per_core: {128 if major >= 9 else 64}
  clock_rate_ghz: {limits.clock_ghz}
  memory_bandwidth: {chip.peak_memory:.0f}
  device_memory_size: {chip.memory_bytes}
  l2_cache_size: {limits.l2_bytes}
  device_address_bits: 64
  shared_memory_per_core: {limits.shared_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {limits.shared_bytes - 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "{_CUDA_VERSION}"
  runtime_version: "{_CUDA_VERSION}"
  compile_time_toolkit_version: "{_CUDA_VERSION}"
  dnn_version: "{".".join(map(str, CUDNN_VERSION))}"
}}
"""
