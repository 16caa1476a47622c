"""Options of XLA's compiler for a device."""

from typing import Any

import jaxlib.version

from moe_jax.sharding.mesh import platform_of


def compiler_options(device: Any) -> dict[str, Any]:
    """Returns the options for a device, which may be abstract; none but for GPUs.

    XLA merges small products of the same input into one, and copies their weights side by side
    each time the program runs. By default up to 32 MiB are small, such as the weights of queries
    and keys at 7B in bfloat16. With 4 MiB, products with the matrices A of adapters are still
    merged, and those with weights of the base no longer are.

    Before jaxlib 0.12, XLA fuses a product on a GPU with the slice of the stacked layers that it
    writes, and computes it a second time for its other uses (openxla/xla PR 45799). All products
    that are kept for the backward pass are concerned. Without the fusion they are copied instead.
    """
    if platform_of([device]) != "gpu":
        return {}
    options: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 4}
    if tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 12):
        options["xla_gpu_enable_dynamic_slice_fusion"] = False
    return options
