"""The interface of an adapter method, and its view of the frozen model.

A method is one file: a frozen dataclass that is both its configuration and the factory of its Linen
modules, derived from `AdapterMethod` and decorated with `@METHODS.register("its_name")`. Its
modules compute on the rows of one adapter and create their variables in the `adapters` collection.
They never create or change base parameters.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
from flax.core import FrozenDict

from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.routing.losses import RouterLoss
from moe_jax.adapters.row_window import RowWindow
from moe_jax.adapters.tree import (
    ALL_MODULES,
    DELTA_NET_MODULES,
    LAYER_EMBEDDING_MODULES,
    TARGET_MODULES,
)
from moe_jax.config.classification import ClassificationConfig
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import Registry, require, suggest
from moe_jax.errors import ConfigError
from moe_jax.layers.quantized import Kernel

METHODS = Registry("method")
"""Adapter methods by the name that `method.name` gives in a configuration."""


class FrozenProjection(NamedTuple):
    """A frozen projection of the adapter's rows.

    Attributes:
      product: x W, [b, S, out], without the bias, which is added after all adapters.
      kernel: W, [in, out].
    """

    product: jax.Array
    kernel: Kernel


class FrozenFFN(NamedTuple):
    """A frozen gated FFN on the adapter's rows, up to its down projection.

    Attributes:
      gate, up: projections of the FFN's input, products [b, S, F].
      gate_bias, up_bias: [F]; None without a bias. The adapter adds them.
      down_kernel: [F, D].
      down_bias: [D]; None without a bias. It is added once, after the adapter.
      activation: activation function of the gate.
    """

    gate: FrozenProjection
    up: FrozenProjection
    gate_bias: jax.Array | None
    up_bias: jax.Array | None
    down_kernel: Kernel
    down_bias: jax.Array | None
    activation: Callable[[jax.Array], jax.Array]


class FFNUpdate(NamedTuple):
    """The result of an adapter that replaces the FFN of its rows: `hidden W_down + output`.

    Attributes:
      hidden: hidden activation [b, S, F] for the frozen down projection, which runs once on the
        rows of all adapters; None if the adapter has applied the down projection itself.
      output: [b, S, D], added to that product.
    """

    hidden: jax.Array | None
    output: jax.Array


class AdapterContext(NamedTuple):
    """Inputs of an adapter module besides the hidden states: facts about its rows and the layer.

    Attributes:
      token_mask: bool [b, S], false at padding.
      layer_index: int32 [], from 0.
      num_layers: L.
      expert_groups: int32 [b, S], group of experts that each token's sequence belongs to, 0 at
        padding (see `SourceConfig.expert_group`); None unless a loss of the adapter reads it.
      segment_ids: int32 [b, S] as in `Batch`; None where every row is one sequence. Anything that
        counts by sequence must use it.
      dropout_key: random key of the dropout of the module's input, so that projections of one input
        share a mask; None without dropout.
      fused_experts: True if `ComputeConfig.experts` is `fused`.
      window: the adapter's rows, where they change from call to call; None where they are static.
      prompt_length: int32 [b], number of tokens of the row's sequence, where a call has a part of
        a prompt only; None where the tokens so far are all that are known.
    """

    token_mask: jax.Array
    layer_index: jax.Array
    num_layers: int
    expert_groups: jax.Array | None = None
    segment_ids: jax.Array | None = None
    dropout_key: jax.Array | None = None
    fused_experts: bool = False
    window: RowWindow | None = None
    prompt_length: jax.Array | None = None

    def input_key(self) -> jax.Array:
        """`dropout_key`, where the module is not deterministic."""
        if self.dropout_key is None:
            raise ValueError("dropout needs a random key: give the model a random stream `dropout`")
        return self.dropout_key


def windows_of(contexts: Mapping[str, AdapterContext]) -> dict[str, RowWindow] | None:
    """Windows of the adapters with these contexts; None where their rows are static."""
    windows = {name: context.window for name, context in contexts.items()}
    return {name: w for name, w in windows.items() if w is not None} or None


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(LowRankConfig, abc.ABC):
    """Settings and hooks that all methods share.

    Methods are hashable, so that they can be static arguments of compiled functions.

    Attributes:
      target_modules: names of the adapted projections.
      classification: labels or range of a score head that is trained with the adapter and replaces
        the language-model head; None keeps the latter.
      new_tokens: special tokens that the base's tokenizer lacks, such as `("<tool>", "</tool>")`.
        Each adds a row to the embedding and the head, trained and saved with the adapter. All
        adapters of a run have the same ones. Default: none.
      new_token_id: id of the first new token. Default None: the next id of the base's tokenizer,
        which a run fills in.
    """

    registry: ClassVar[Registry] = METHODS

    target_modules: tuple[str, ...]
    classification: ClassificationConfig | None = None
    new_tokens: tuple[str, ...] = ()
    new_token_id: int | None = None

    def __post_init__(self):
        super().__post_init__()
        repeated = {token for token in self.new_tokens if self.new_tokens.count(token) > 1}
        require(all(self.new_tokens), "new_tokens", "holds an empty text")
        spaced = [token for token in self.new_tokens if token != token.strip()]
        require(
            not spaced,
            "new_tokens",
            f"{spaced} begin or end with whitespace, which texts hold everywhere; leave it out",
        )
        require(not repeated, "new_tokens", f"names {', '.join(sorted(repeated))} more than once")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):  # mappings are given as dicts, which have no hash
                object.__setattr__(self, field.name, FrozenDict(value))
        require(bool(self.target_modules), "target_modules", "names no module")
        for name in self.target_modules:
            require(
                name in ALL_MODULES,
                "target_modules",
                f"{name!r} matches no module of the model; {suggest(name, ALL_MODULES)}",
            )

    @property
    def low_rank(self) -> LowRankConfig:
        """Settings of this method's low-rank pairs."""
        return LowRankConfig(**{f.name: getattr(self, f.name) for f in fields(LowRankConfig)})

    @property
    def routes(self) -> bool:
        """True if the method has routers; these must sow their statistics."""
        return False

    @property
    def routes_by_sequence(self) -> bool:
        """True if a token's routing depends on other tokens of its sequence."""
        return False

    @property
    def is_additive(self) -> bool:
        """True if frozen products are needed for nothing but sums with deltas, not for gradients.

        Rematerialization then keeps the sums in their place. A module of `mlp_adapter` has to name
        them, see `FrozenLinear.kept`. Methods from outside may leave it false.
        """
        return False

    @property
    def router_losses(self) -> Mapping[str, RouterLoss]:
        """Auxiliary losses of the method's routers, by name; empty if it does not route."""
        return {}

    @property
    def needs_expert_groups(self) -> bool:
        """True if a loss reads `AdapterContext.expert_groups`."""
        return any(loss.needs_sequences for loss in self.router_losses.values())

    def check_expert_groups(self, groups: Mapping[str, int]) -> None:
        """Refuses, with `require`, expert groups of data sets that do not fit the losses."""
        for loss in self.router_losses.values():
            loss.check_expert_groups(groups)

    def check_model(self, model: ModelConfig) -> None:
        """Refuses, with `require`, settings that do not go with this model, such as its depth."""
        for modules, exists, kind in (
            (DELTA_NET_MODULES, model.delta_net is not None, "linear attention"),
            (LAYER_EMBEDDING_MODULES, model.has_layer_embeddings, "embeddings of each layer"),
        ):
            absent = [name for name in self.target_modules if name in modules]
            require(
                not absent or exists,
                "target_modules",
                f"{', '.join(absent)} are projections of {kind}, which a model of type "
                f"{model.model_type!r} does not have",
            )
        require(
            not self.new_tokens or not model.has_layer_embeddings,
            "new_tokens",
            f"the base, of type {model.model_type!r}, also has embeddings of each layer, which new "
            "tokens would lack; leave it out",
        )
        with_experts = self.routes or self.mlp_adapter() is not None
        require(
            not with_experts or not model.has_wide_ffn,
            "name",
            f"experts need FFNs of one width, and this base has FFNs of {model.intermediate_size} "
            f"and {model.reader_ffn_width} channels; use a method without experts, such as 'lora'",
        )

    @abc.abstractmethod
    def projection_adapter(self, target: str, axes: tuple[str, str]) -> "nn.Module | None":
        """The module that adapts the projection `target`, or None to leave it frozen.

        It is called as `module(x, frozen, context, deterministic=...)` with the projection's input
        [b, S, in], a `FrozenProjection` and an `AdapterContext`, and returns the adapted product
        [b, S, out]; the bias is added after it.

        Args:
          target: one of `ALL_MODULES`.
          axes: logical axes of the projection's kernel, (in, out).
        """

    def mlp_adapter(self) -> "nn.Module | None":
        """The module that replaces the FFN as a whole, or None if only projections are adapted.

        It is called as `module(x, ffn, context, deterministic=...)` with the FFN's input [b, S, D],
        a `FrozenFFN` and an `AdapterContext`, and returns an `FFNUpdate`.
        """
        return None


def require_language_model(method: AdapterMethod, adapter: str, operation: str) -> None:
    """Refuses a classification adapter where next-token predictions are needed.

    Args:
      method: method of the adapter.
      adapter: name or folder of the adapter, for the message.
      operation: the refused operation, for example `generate text`.

    Raises:
      ConfigError: the adapter has a score head.
    """
    if method.classification is not None:
        raise ConfigError(
            f"adapter {adapter!r}: is a classifier ({method.classification.describe()}); its score "
            f"head replaces the language-model head, so that it cannot {operation}; give an "
            "adapter that was trained without method.classification"
        )


@dataclass(frozen=True, kw_only=True)
class NoAdapter(AdapterMethod):
    """The method of rows that belong to the base model alone; it has no weights.

    The values of its fields are placeholders that are never read.
    """

    rank: int = 1
    alpha: float = 1.0
    target_modules: tuple[str, ...] = TARGET_MODULES

    @property
    def is_additive(self) -> bool:
        return True

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        return None
