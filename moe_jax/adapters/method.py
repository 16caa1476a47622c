"""What an adapter sees of the frozen model around it."""

import abc
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.routing.losses import RouterLoss
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.data import DataConfig
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import Registry, require, suggest
from moe_jax.errors import ConfigError
from moe_jax.layers.quantized import Kernel
from moe_jax.layers.token_blocks import block_length


class FrozenProjection(NamedTuple):
    """A frozen projection applied to the adapter's rows.

    Attributes:
      product: x W, [b, S, out], without the bias, which is added after all adapters.
      kernel: W, [in, out].
    """

    product: jax.Array
    kernel: Kernel


class FrozenFFN(NamedTuple):
    """A gated FFN around the adapter's rows, up to its down projection.

    Attributes:
      gate, up: the products with the FFN's input, [b, S, F] each.
      gate_bias, up_bias, down_bias: [F], [F] and [D]; None where there is none. The adapter adds
        the first two; the last is added after it, once.
      down_kernel: [F, D].
      activation: of the gate.
    """

    gate: FrozenProjection
    up: FrozenProjection
    gate_bias: jax.Array | None
    up_bias: jax.Array | None
    down_kernel: Kernel
    down_bias: jax.Array | None
    activation: Callable[[jax.Array], jax.Array]


class AdapterContext(NamedTuple):
    """What an adapter knows of its rows and its place.

    Attributes:
      token_mask: bool [b, S], false at padding.
      layer_index: int32 [], from 0.
      num_layers: L.
      expert_groups: int32 [b, S], the group of experts that each token's sequence belongs to, 0 at
        padding (see `SourceConfig.expert_group`); None unless one of the adapter's losses reads it.
      segment_ids: int32 [b, S] as in `Batch`; None where every row is one sequence. Whatever counts
        by sequence must heed it.
      shards: over how many devices, or groups of them, the rows are divided.
      block_tokens: see `ComputeConfig.block_tokens`.
      recomputes: whether the backward pass computes activations again.
    """

    token_mask: jax.Array
    layer_index: jax.Array
    num_layers: int
    expert_groups: jax.Array | None = None
    segment_ids: jax.Array | None = None
    shards: int = 1
    block_tokens: int | None = None
    recomputes: bool = True

    def block_length(self, tokens: int, width: int, dtype: jnp.dtype) -> int:
        """Of so many tokens of a device, how many to compute at a time; see `block_length`.

        Args:
          tokens: of a device.
          width: of the widest array [tokens, width].
          dtype: its type.
        """
        return block_length(tokens, width, dtype, self.block_tokens)


# FIXME docstring of the merged adapters.method:
# """What an adapter method has to provide.
#
# A method is one file: a frozen dataclass that is both its configuration and the factory of its
# Linen modules, derived from `AdapterMethod` and decorated with `@METHODS.register("its_name")`. Its
# modules compute on the rows of one adapter and create their variables in the `adapters` collection;
# the base parameters are none of their business.
# """


METHODS = Registry("method")
"""The methods by the name that `method.name` in a configuration gives."""

Finish = Callable[[jax.Array], jax.Array]
"""What becomes of an adapter's rows after the frozen down projection; see `mlp_adapter`."""


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(LowRankConfig, abc.ABC):
    """Fields and hooks that all methods share; see the module's docstring.

    Attributes:
      target_modules: the projections that are adapted.
      classification: what a score head, trained with the adapter, tells apart; None leaves the
        base's own head, which predicts the next token.
    """

    registry: ClassVar[Registry] = METHODS

    target_modules: tuple[str, ...]
    classification: ClassificationConfig | None = None

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.target_modules), "target_modules", "names no module")
        for name in self.target_modules:
            require(
                name in TARGET_MODULES,
                "target_modules",
                f"{name!r} matches no module of the model; {suggest(name, TARGET_MODULES)}",
            )

    @property
    def low_rank(self) -> LowRankConfig:
        """The pairs of this method alone."""
        own = {field.name: getattr(self, field.name) for field in fields(LowRankConfig)}
        return LowRankConfig(**own)

    @property
    def routes(self) -> bool:
        """Whether this method has routers, which then must have sown their statistics."""
        return False

    @property
    def router_losses(self) -> dict[str, RouterLoss]:
        """The auxiliary losses of this method's routers, by name; empty if it does not route."""
        return {}

    @property
    def needs_expert_groups(self) -> bool:
        """Whether a loss reads the groups of the sequences, `AdapterContext.expert_groups`."""
        return any(loss.by_sequence for loss in self.router_losses.values())

    def check_data(self, data: DataConfig) -> None:
        """Refuses, with `require`, data sets that do not go with the head or the losses."""
        require(
            self.classification is None or not data.is_packed,
            "packing",
            "a classifier has one answer for each row, which can then hold one sequence only; "
            "leave packing out, and set buckets",
        )
        for split in ("train", "validation"):
            for name, source in getattr(data, split).items():
                classified = source.schema == "classification"
                require(
                    classified or self.classification is None or source.task is not None,
                    f"{split}.{name}.schema",
                    f"{source.schema!r}, but method.classification learns rows of the schema "
                    "'classification' or of a GLUE task",
                )
                require(
                    not classified or self.classification is not None,
                    f"{split}.{name}.schema",
                    "'classification' needs method.classification, which names the labels",
                )
        for loss in self.router_losses.values():
            loss.check_data(data)

    def check_model(self, model: ModelConfig) -> None:
        """Refuses, with `require`, settings that do not go with this model, such as its depth."""

    @abc.abstractmethod
    def projection_adapter(self, target: str, axes: tuple[str, str]) -> "nn.Module | None":
        """The module that adapts the projection `target`, or None to leave it frozen.

        It is called as `module(x, frozen, context, deterministic=...)` with the projection's input
        [b, S, in], a `FrozenProjection` and an `AdapterContext`, and returns the adapted product
        [b, S, out]; the bias is added after it.

        Args:
          target: one of `TARGET_MODULES`.
          axes: logical axes of the projection's kernel, (in, out).
        """

    def mlp_adapter(self) -> "nn.Module | None":
        """The module that adapts the FFN as a whole, or None if the projections are all there is.

        It is called as `module(x, ffn, context, deterministic=...)` with the FFN's input [b, S, D],
        a `FrozenFFN` and an `AdapterContext`, and returns the hidden activation [b, S, F] that the
        frozen down projection is applied to, and a function that makes the FFN's output, without
        its bias, of that product [b, S, D].
        """
        return None


def require_language_model(method: AdapterMethod, adapter: str, what: str) -> None:
    """Refuses a classification adapter where the next token is asked for.

    Args:
      method: of the adapter.
      adapter: its name or folder, for the message.
      what: cannot be done with it, for example `generate text`.

    Raises:
      ConfigError: the adapter has a score head.
    """
    if method.classification is not None:
        raise ConfigError(
            f"adapter {adapter!r}: is a classifier ({method.classification.describe()}), whose "
            f"score head takes the place of the language model's, and cannot {what}; give an "
            "adapter that was trained without method.classification"
        )


# FIXME docstring of the merged adapters.no_adapter:
# """The method of rows that no adapter changes, beside rows that some do."""


@dataclass(frozen=True, kw_only=True)
class NoAdapter(AdapterMethod):
    """Leaves its rows to the base. It has no weights and no name in a configuration."""

    rank: int = 1
    alpha: float = 1.0
    target_modules: tuple[str, ...] = TARGET_MODULES

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        return None
