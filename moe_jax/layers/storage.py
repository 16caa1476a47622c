"""How the frozen parameters are kept, in types."""

from typing import NamedTuple, get_args

import jax.numpy as jnp

from moe_jax.config.model import FloatType, StorageType


class Storage(NamedTuple):
    """What a `StorageType` says.

    Attributes:
      dtype: of all leaves but quantised kernels.
      quantization: what `quantize` makes of the kernels of the layers' projections; None leaves
        them in `dtype`.
    """

    dtype: jnp.dtype
    quantization: str | None


def storage_of(kept: StorageType | str) -> Storage:
    """The types of a `StorageType`."""
    if kept in get_args(FloatType):
        return Storage(jnp.dtype(kept), None)
    return Storage(jnp.dtype("bfloat16"), kept)
