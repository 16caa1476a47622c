"""What an adapter method has to provide.

A method is one file: a frozen dataclass that is both its configuration and the factory of its Linen
modules, derived from `AdapterMethod`, and one line in `moe_jax/adapters/__init__.py`. Its modules
compute on the rows of one adapter and create their variables in the `adapters` collection; the
base parameters are none of their business.
"""

import abc
from dataclasses import dataclass
from typing import Literal

import flax.linen as nn

from moe_jax.config.parse import require, suggest

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
TARGET_MODULES = ATTENTION_MODULES + MLP_MODULES


@dataclass(frozen=True, kw_only=True)
class RouterLossConfig:
    """One auxiliary loss of a router; its name is a key of `aux_losses.ROUTER_LOSSES`.

    Attributes:
      coefficient: its weight in the total loss.
      scope: `per_layer` takes the loss of each layer and averages; `pooled` first adds up the
        statistics of all layers, as transformers does, and is blind to layers that collapse onto
        different experts.
    """

    coefficient: float
    scope: Literal["per_layer", "pooled"] = "per_layer"

    def __post_init__(self):
        require(self.coefficient >= 0, "coefficient", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(abc.ABC):
    """Fields and hooks that all methods share; see the module's docstring.

    Attributes:
      rank: R of each low-rank pair.
      alpha: a pair's product is scaled by alpha / rank.
      target_modules: the projections that are adapted.
      dropout: share of a pair's inputs that is dropped while training.
      init: distribution of A; B starts at zero. `kaiming` is uniform within 1 / sqrt(inputs);
        `gaussian` is normal with standard deviation 1 / rank.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian"] = "kaiming"

    def __post_init__(self):
        require(self.rank > 0, "rank", "must be positive")
        require(self.alpha > 0, "alpha", "must be positive")
        require(0.0 <= self.dropout < 1.0, "dropout", "must lie in [0, 1)")
        require(bool(self.target_modules), "target_modules", "names no module")
        for name in self.target_modules:
            require(
                name in TARGET_MODULES,
                "target_modules",
                f"{name!r} matches no module of the model; {suggest(name, TARGET_MODULES)}",
            )

    @property
    def routes(self) -> bool:
        """Whether this method has routers, which then must have sown their statistics."""
        return False

    @property
    def router_losses(self) -> dict[str, RouterLossConfig]:
        """The auxiliary losses of this method's routers, by name; empty if it does not route."""
        return {}

    @abc.abstractmethod
    def projection_adapter(self, target: str, axes: tuple[str, str]) -> "nn.Module | None":
        """The module that adapts the projection `target`, or None to leave it frozen.

        It is called as `module(x, y, deterministic=...)` with the projection's input [b, S, in] and
        its frozen output [b, S, out], and returns the adapted output.

        Args:
          target: one of `TARGET_MODULES`.
          axes: logical axes of the projection's kernel, (in, out).
        """

    def mlp_adapter(self) -> "nn.Module | None":
        """The module that adapts the FFN as a whole, or None if the projections are all there is.

        It is called as `module(x, gate, up, activation, token_mask, deterministic=...)` with the
        FFN's input [b, S, D] and the frozen products `gate` and `up` [b, S, F], and returns the
        hidden activation [b, S, F] that the frozen down projection is applied to, and what is to
        be added to that projection's output, [b, S, D] or None.
        """
        return None
