"""How the frozen parameters are kept, in types."""

from typing import NamedTuple, get_args

import jax.numpy as jnp

from moe_jax.config.model import FloatType, ModelConfig, StorageType
from moe_jax.config.parse import require, suggest
from moe_jax.errors import ConfigError


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
    """The types of a `StorageType`.

    Raises:
      ConfigError: it is none.
    """
    if kept not in get_args(StorageType):
        raise ConfigError(
            f"dtype {kept!r}: no type to keep a base in; {suggest(kept, get_args(StorageType))}"
        )
    if kept in get_args(FloatType):
        return Storage(jnp.dtype(kept), None)
    return Storage(jnp.dtype("bfloat16"), kept)


def check_storage(storage: Storage, model: ModelConfig) -> None:
    """Refuses, with `require`, a model that cannot be kept so: four bits pack inputs in pairs."""
    if storage.quantization not in ("nf4", "nf4_double"):
        return
    inputs = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "heads times head_dim": model.num_heads * model.head_dim,
    }
    for name, size in inputs.items():
        require(
            size % 2 == 0,
            "param_dtype",
            f"{storage.quantization!r} packs inputs in pairs, and this model's {name} is {size}; "
            "use 'int8' or 'fp8'",
        )
