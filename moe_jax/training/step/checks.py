"""Whether adapters go with the model and the devices; asked before anything slow."""

from jax.sharding import Mesh

from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import located
from moe_jax.config.run import RunConfig
from moe_jax.errors import ConfigError


def require_fitting_methods(config: RunConfig, model: ModelConfig) -> None:
    """Raises `ConfigError` for a method that does not go with the model, such as its depth."""
    for name, adapter in config.adapters.items():
        with located(f"config.adapters.{name}.method"):
            adapter.method.check_model(model)


def require_divisible_rows(config: RunConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` where an adapter's rows do not spread evenly over the devices."""
    shards, micro = mesh.shape["data"] * mesh.shape["fsdp"], config.training.micro_batches
    for name, adapter in config.adapters.items():
        if adapter.batch_size // micro % shards:
            raise ConfigError(
                f"config.adapters.{name}.batch_size: a micro-batch of "
                f"{adapter.batch_size // micro} rows does not divide over {shards} devices "
                f"(mesh data x fsdp); make it a multiple of {shards * micro}"
            )
