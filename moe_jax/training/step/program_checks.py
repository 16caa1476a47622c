"""Checks that a configuration fits the model and the mesh, before a program is built."""

from jax.sharding import Mesh

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import located
from moe_jax.config.run import RunConfig
from moe_jax.errors import ConfigError, DeviceError
from moe_jax.sharding.rules import num_row_shards


def require_fitting_methods(config: RunConfig, model: ModelConfig) -> None:
    """Raises `ConfigError` if an adapter's method is invalid for the model, e.g. for its depth."""
    for name, adapter in config.adapters.items():
        with located(f"config.adapters.{name}.method"):
            adapter.method.check_model(model)


def require_fusible_experts(config: RunConfig, mesh: Mesh) -> None:
    """Raises `UserError` if the kernels of `compute.experts` fit neither mesh nor adapters.

    What an adapter's method needs of them is checked when it is traced.
    """
    if config.compute.experts != "fused":
        return
    if mesh.size > 1:
        raise DeviceError(
            f"config.compute.experts: 'fused' needs a mesh of one device, not of {mesh.size}, as "
            "XLA cannot divide its kernels; use 'einsum'"
        )
    if all(adapter.method.mlp_adapter() is None for adapter in config.adapters.values()):
        raise ConfigError(
            "config.compute.experts: 'fused' computes the experts of 'mixlora', and no adapter has "
            "that method; leave it out"
        )


def require_divisible_rows(config: RunConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` if an adapter's rows do not divide evenly over the devices."""
    shards, micro = num_row_shards(mesh), config.training.micro_batches
    for name, adapter in config.adapters.items():
        size = adapter.rows_per_example
        if adapter.batch_size // micro % (shards * size):
            of_pairs = "" if size == 1 else f", with the {size} rows of an example on one"
            raise ConfigError(
                f"config.adapters.{name}.batch_size: a micro-batch of "
                f"{adapter.batch_size // micro} rows does not divide over {shards} devices "
                f"(mesh data x fsdp){of_pairs}; make it a multiple of {shards * micro * size}"
            )
