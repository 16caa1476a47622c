"""The router interface: from a token's hidden state to its experts and their weights."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config.parse import Registry, require
from moe_jax.layers.frozen import adapter_leaf
from moe_jax.layers.kv_cache import read_cache, write_cache
from moe_jax.layers.names import LOW_RANK
from moe_jax.layers.split_product import split_product
from moe_jax.sharding.axes import EXPERTS

ROUTERS = Registry("router")
"""Routing strategies by the name that `router.name` gives in a configuration."""

ABSENT = -1e9
"""Logit of an expert that a layer does not have. Its probability is exactly zero and, unlike minus
infinity, it causes no NaN in an entropy or a gradient."""


class Routing(NamedTuple):
    """The experts and weights of every token; all fields are float32.

    A slot is a term of a token's sum over experts. Either the router selects an expert for each of
    C slots (`dispatch` is one-hot), or slot c is expert c for every token (`dispatch` is None, C =
    E), where any number of experts may be active.

    Attributes:
      router_logits: [B, S, E].
      router_probs: [B, S, E], softmax of the logits.
      dispatch: [B, S, C, E], one-hot over E, or zero for a slot without an expert; None if slot c
        is expert c.
      weights: [B, S, C], weight of each slot in the output.
      load: [B, S, E], load that each token puts on each expert: 1 or 0 for routers that select
        experts, the weight for routers that mix all of them.
      bypass: [B, S], weight of the FFN's input in its output; None for no bypass.
      overflow: [B, S], 1 for a token whose expert has no capacity left, 0 otherwise, undefined at
        padding; None if capacity is unlimited.
    """

    router_logits: jax.Array
    router_probs: jax.Array
    dispatch: jax.Array | None
    weights: jax.Array
    load: jax.Array
    bypass: jax.Array | None = None
    overflow: jax.Array | None = None

    @property
    def combine(self) -> jax.Array:
        """Weight of each expert in the output, [B, S, E]."""
        if self.dispatch is None:
            return self.weights
        return jnp.einsum("bsc,bsce->bse", self.weights, self.dispatch, precision="highest")

    def masked_by_layer(self, routed: jax.Array) -> "Routing":
        """This routing in a routed layer, and the frozen FFN alone in a layer that is not routed.

        In the latter the first slot has no expert and all the weight.

        Args:
          routed: bool [].

        Raises:
          ValueError: slots are experts, and none of them is the frozen FFN.
        """
        if self.dispatch is None:
            raise ValueError("a router whose slots are the experts must route every layer")
        frozen_only_weights = jnp.zeros_like(self.weights).at[..., 0].set(1.0)
        return self._replace(
            dispatch=jnp.where(routed, self.dispatch, 0.0),
            weights=jnp.where(routed, self.weights, frozen_only_weights),
            bypass=None if self.bypass is None else jnp.where(routed, self.bypass, 0.0),
        )


@dataclass(frozen=True, kw_only=True)
class Router(abc.ABC):
    """Base class of routing strategies.

    To add one, derive a frozen dataclass, decorate it with `@ROUTERS.register("its_name")` and
    import its module in `moe_jax.adapters.routing`. Training needs no other change.

    Attributes:
      init_std: standard deviation of the router's initial kernel.
      jitter_noise: during training, the router's input is multiplied by uniform noise in
        [1 - jitter_noise, 1 + jitter_noise] (arXiv:2101.03961, section 2.2); the experts' input is
        not.
    """

    registry: ClassVar[Registry] = ROUTERS
    limits_load: ClassVar[bool] = False
    """True if tokens can overflow, which only methods that route whole FFNs can handle."""

    init_std: float = 0.02
    jitter_noise: float = 0.0

    def __post_init__(self):
        require(self.init_std > 0, "init_std", "must be positive")
        require(0.0 <= self.jitter_noise < 1.0, "jitter_noise", "must lie in [0, 1)")

    def check(self, num_experts: int) -> None:
        """Refuses, with `require`, settings that do not fit this number of experts."""
        require(num_experts > 0, "num_experts", "must be positive")

    def check_depth(self, num_layers: int) -> None:
        """Refuses, with `require`, settings that do not fit this number of layers."""
        require(num_layers > 0, "num_layers", "must be positive")

    def routes_layer(self, layer_index: jax.Array) -> jax.Array | None:
        """True if the layer is routed, a boolean scalar; None if every layer is.

        Only routers that select experts may leave layers frozen; see `Routing.masked_by_layer`.

        Args:
          layer_index: int32 [], from 0.
        """
        return None

    @abc.abstractmethod
    def route(
        self,
        router_logits: jax.Array,
        token_mask: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        earlier: jax.Array | None = None,
        prompt_length: jax.Array | None = None,
    ) -> Routing:
        """Routes every token.

        Args:
          router_logits: float32 [B, S, E]; `ABSENT` where the layer has no such expert.
          token_mask: bool [B, S], false at padding, which must not take capacity from real tokens.
          segment_ids: int [B, S], the sequence of each token where rows are packed (see `Batch`);
            None where every row is one sequence. Only routers that limit load read it.
          earlier: int32 [B, E], number of each row's earlier tokens that chose each expert, in
            decoding; None for none. Only routers that limit load read it.
          prompt_length: see `AdapterContext`; read by the same routers.
        """


class RouterLogits(nn.Module):
    """A linear layer on the hidden state, computed in float32 whatever the model's dtype.

    Attributes:
      router: settings of initialization and jitter.
      num_experts: E.
      axis: logical axis of the input width.

    Leaf: `kernel` [D, E].
    """

    router: Router
    num_experts: int
    axis: str

    @nn.compact
    def __call__(
        self, x: jax.Array, *, deterministic: bool, present: jax.Array | None = None
    ) -> jax.Array:
        """Router logits, float32 [B, S, E], of x [B, S, D].

        Args:
          x: hidden states.
          deterministic: turns jitter off.
          present: bool [E], the experts that this layer has; None if it has all. The kernel of the
            others is zero and stays zero, since it gets no gradient.
        """

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            drawn = nn.initializers.normal(self.router.init_std)(key, shape, dtype)
            return drawn if present is None else drawn * present[None].astype(dtype)

        shape = (x.shape[-1], self.num_experts)
        kernel = adapter_leaf(self, "kernel", init, shape, (self.axis, EXPERTS))
        jitter = self.router.jitter_noise
        if jitter > 0.0 and not deterministic:
            x = x.astype(jnp.float32)
            noise = jax.random.uniform(
                self.make_rng("dropout"), x.shape, x.dtype, 1.0 - jitter, 1.0 + jitter
            )
            x = x * noise
        # Tokens along one axis: over two, XLA transposes the wide operand for the kernel's
        # gradient.
        flat = x.reshape(-1, x.shape[-1])
        logits = split_product(flat, kernel)
        logits = logits.reshape(*x.shape[:-1], self.num_experts)
        logits = checkpoint_name(logits, LOW_RANK)
        return logits if present is None else jnp.where(present, logits, ABSENT)


def route_with_cache(
    module: nn.Module,
    router: Router,
    router_logits: jax.Array,
    token_mask: jax.Array,
    segment_ids: jax.Array | None,
    prompt_length: jax.Array | None = None,
) -> Routing:
    """Routes tokens, and in decoding after the earlier tokens of their rows.

    A router with limited load has to know how many earlier tokens chose each expert. `module` keeps
    these counts, int32 [B, E], in the collection `cache`.

    Args:
      module: the routed module.
      router: the routing strategy.
      router_logits: float32 [B, S, E].
      token_mask: bool [B, S], false at padding.
      segment_ids: int [B, S], see `Router.route`; a cache is filled from rows of one sequence each.
      prompt_length: see `AdapterContext`.
    """
    if not router.limits_load:
        return router.route(router_logits, token_mask)
    earlier = read_cache(module, "expert_counts")
    if earlier is not None:
        segment_ids = None
    routing = router.route(
        router_logits,
        token_mask,
        segment_ids=segment_ids,
        earlier=earlier,
        prompt_length=prompt_length,
    )
    # The load counts what tokens chose, whether the expert had capacity or not.
    counted = routing.load * token_mask[..., None].astype(routing.load.dtype)
    counts = jnp.sum(counted, axis=1).astype(jnp.int32)
    write_cache(module, "expert_counts", counts if earlier is None else earlier + counts)
    return routing
