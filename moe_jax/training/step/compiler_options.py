"""Options of XLA's compiler for the training step."""

from typing import Any

import jaxlib.version

from moe_jax.sharding.mesh import platform_of


def compiler_options(device: Any) -> dict[str, Any]:
    """Returns the options for a device, which may be abstract; most often none.

    Before jaxlib 0.12, XLA fuses a product on a GPU with the slice of the stacked layers that it
    writes, and computes it a second time for its other uses (openxla/xla PR 45799). All products
    that are kept for the backward pass are concerned. Without the fusion they are copied instead.
    """
    version = tuple(map(int, jaxlib.version.__version__.split(".")[:2]))
    if platform_of([device]) != "gpu" or version >= (0, 12):
        return {}
    return {"xla_gpu_enable_dynamic_slice_fusion": False}
