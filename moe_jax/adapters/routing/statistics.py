"""Statistics of routed layers: sums over tokens, and the routing of each token.

`RouterStatistics` holds sums, from which losses and metrics are computed; sums, not means, because
they add up over devices and layers. They are sown in every step. `TokenRouting` holds the routing
of each token, for inspection; it is computed only if the collection `routing` is mutable.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from moe_jax.adapters.routing.router import Routing
from moe_jax.adapters.tree import split_by_adapter
from moe_jax.layers.names import ROUTER, ROUTING
from moe_jax.layers.tokens import sequence_sums

STATISTICS = "statistics"

_sum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class SequenceStatistics(NamedTuple):
    """Mean expert weights of each sequence in one layer, float32.

    N is the number of rows. Where rows are packed, N is the number of tokens, and each sequence is
    at the entry of its last token.

    Attributes:
      weights: [N, E], mean weight of each expert over the sequence's real tokens.
      group: [N], group of experts that the sequence belongs to.
      real: [N], 1 for a sequence, 0 for an entry without one, whose weights are 0.
    """

    weights: jax.Array
    group: jax.Array
    real: jax.Array


class RouterStatistics(NamedTuple):
    """Sums over the real tokens of one layer, float32; padding does not count.

    The scan over layers adds a leading axis L to each field.

    Attributes:
      routed: [], 1 if the layer routes, 0 if it stays frozen, with all sums 0.
      present: [E], 1 for the experts that the layer has.
      tokens: [], number of tokens.
      load_sum: [E], sum of `Routing.load`, the number of tokens of each expert; without gradient.
      probability_sum: [E], sum of router probabilities.
      weight_sum: [E], sum of the experts' weights.
      squared_logsumexp_sum: [], sum of squared log-partition functions of the router logits.
      entropy_sum: [], sum of the router distributions' entropies in nats.
      weighted_tokens: [], number of tokens with an expert.
      effective_sum: [], sum of their `effective_experts`; without gradient.
      sequences: statistics by sequence; None unless a loss of the adapter reads them.
      overflow_sum: [], number of tokens whose expert had no capacity left; None without a limit.
    """

    routed: jax.Array
    present: jax.Array
    tokens: jax.Array
    load_sum: jax.Array
    probability_sum: jax.Array
    weight_sum: jax.Array
    squared_logsumexp_sum: jax.Array
    entropy_sum: jax.Array
    weighted_tokens: jax.Array
    effective_sum: jax.Array
    sequences: SequenceStatistics | None = None
    overflow_sum: jax.Array | None = None

    @property
    def num_experts(self) -> jax.Array:
        """Number of experts of the layer."""
        return jnp.sum(self.present, axis=-1)

    def pooled(self) -> "RouterStatistics":
        """Statistics of all layers together; they must have equal numbers of experts."""
        summed = jax.tree.map(lambda field: jnp.sum(field, axis=0), self)
        sequences = self.sequences
        if sequences is not None:
            group, real = jnp.max(sequences.group, axis=0), jnp.max(sequences.real, axis=0)
            sequences = summed.sequences._replace(group=group, real=real)
        return summed._replace(
            routed=jnp.max(self.routed, axis=0),
            present=jnp.max(self.present, axis=0),
            sequences=sequences,
        )


def router_statistics(
    routing: Routing,
    token_mask: jax.Array,
    *,
    routed: jax.Array | None = None,
    present: jax.Array | None = None,
    expert_groups: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> RouterStatistics:
    """Statistics of one layer.

    Args:
      routing: routing of all tokens.
      token_mask: bool [B, S], false at padding.
      routed: bool [], false if the layer stays frozen; None for true.
      present: bool [E], experts that the layer has; None for all.
      expert_groups: int [B, S], group of each token's sequence, 0 at padding; None leaves
        `sequences` out.
      segment_ids: int [B, S] as in `Batch`; None if every row is one sequence.
    """
    sequences = None
    routed, present = _layer_facts(routing, routed, present)
    mask = token_mask.astype(jnp.float32) * routed
    log_probs = jax.nn.log_softmax(routing.router_logits, axis=-1)
    entropy = -jnp.sum(routing.router_probs * log_probs, axis=-1)
    logsumexp = jax.nn.logsumexp(routing.router_logits, axis=-1)
    if expert_groups is not None and segment_ids is None:
        sequences = _sequence_statistics(routing, mask, expert_groups)
    elif expert_groups is not None and segment_ids is not None:
        sequences = _packed_sequence_statistics(routing, mask, expert_groups, segment_ids)
    effective = jax.lax.stop_gradient(effective_experts(routing.combine))
    return RouterStatistics(
        routed=routed,
        present=present,
        tokens=jnp.sum(mask),
        load_sum=jax.lax.stop_gradient(_sum("bs,bse->e", mask, routing.load) * present),
        probability_sum=_sum("bs,bse->e", mask, routing.router_probs),
        weight_sum=_sum("bs,bse->e", mask, routing.combine),
        squared_logsumexp_sum=jnp.sum(mask * jnp.square(logsumexp)),
        entropy_sum=jnp.sum(mask * entropy),
        weighted_tokens=jnp.sum(mask * (effective > 0).astype(mask.dtype)),
        effective_sum=jnp.sum(mask * effective),
        sequences=sequences,
        overflow_sum=None if routing.overflow is None else jnp.sum(mask * routing.overflow),
    )


def effective_experts(weights: jax.Array) -> jax.Array:
    """Effective number of experts of each token (ReMix, arXiv:2603.10160).

    This is the inverse of the sum of the squared weights, which are normalized to sum to one: 1 if
    one expert has all the weight, k if k experts have equal weights.

    Args:
      weights: [..., E], weights of the experts in the token's output.

    Returns:
      float32 [...], 0 for a token whose weights are all zero.
    """
    largest = jnp.max(weights, axis=-1, keepdims=True)
    scaled = weights / jnp.where(largest > 0, largest, 1.0)  # no underflow of the squares
    squares = jnp.sum(jnp.square(scaled), axis=-1)
    return jnp.square(jnp.sum(scaled, axis=-1)) / jnp.where(squares > 0, squares, 1.0)


def _sequence_statistics(
    routing: Routing, mask: jax.Array, expert_groups: jax.Array
) -> SequenceStatistics:
    """Statistics of rows of one sequence each."""
    tokens = jnp.sum(mask, axis=-1)
    weights = _sum("bs,bse->be", mask, routing.combine)
    return SequenceStatistics(
        weights=weights / jnp.maximum(tokens, 1.0)[:, None],
        group=jnp.max(expert_groups, axis=-1).astype(jnp.float32),  # 0 at padding
        real=jnp.minimum(tokens, 1.0),
    )


def _packed_sequence_statistics(
    routing: Routing, mask: jax.Array, expert_groups: jax.Array, segment_ids: jax.Array
) -> SequenceStatistics:
    """Statistics of packed rows, whose number of sequences is not known at compile time."""
    summed = jnp.concatenate([mask[..., None] * routing.combine, mask[..., None]], axis=-1)
    sums, is_last = sequence_sums(summed, segment_ids)
    tokens = jnp.where(is_last, sums[..., -1], 0.0)
    means = sums[..., :-1] / jnp.maximum(sums[..., -1:], 1.0)
    return SequenceStatistics(
        weights=jnp.where(is_last[..., None], means, 0.0).reshape(-1, means.shape[-1]),
        group=expert_groups.reshape(-1).astype(jnp.float32),
        real=jnp.minimum(tokens, 1.0).reshape(-1),
    )


def collect_statistics(sown: Mapping[str, Any]) -> dict[str, dict[str, RouterStatistics]]:
    """Statistics of each adapter, `{adapter: {site: statistics}}`, with a leading axis L.

    A site is the position of the routers in a layer, for example `mlp/moe` or `self_attn/q_proj`.

    Args:
      sown: variables returned by `apply(..., mutable=["router"])`.

    Raises:
      ValueError: the collection is missing. Sowing into a collection that is not mutable does
        nothing, so that its absence is an error of the caller and never means "no routers".
    """
    return _collect(sown, ROUTER, STATISTICS)


TOKENS = "tokens"


class TokenRouting(NamedTuple):
    """Routing of each token of one layer, float32; zero at padding and in a frozen layer.

    The scan over layers adds a leading axis L to each field.

    Attributes:
      weights: [B, S, E], weight of each expert in the token's output.
      probabilities: [B, S, E], router probabilities, before experts are selected.
      load: [B, S, E], see `Routing.load`.
      routed: [], 1 if the layer routes, 0 if it stays frozen.
      present: [E], 1 for the experts that the layer has.
    """

    weights: jax.Array
    probabilities: jax.Array
    load: jax.Array
    routed: jax.Array
    present: jax.Array


def token_routing(
    routing: Routing,
    token_mask: jax.Array,
    *,
    routed: jax.Array | None = None,
    present: jax.Array | None = None,
) -> TokenRouting:
    """The routing of each token of one layer; arguments as in `router_statistics`."""
    routed, present = _layer_facts(routing, routed, present)
    mask = (token_mask.astype(jnp.float32) * routed)[..., None]
    return TokenRouting(
        weights=mask * routing.combine,
        probabilities=mask * routing.router_probs,
        load=mask * routing.load * present[None, None],
        routed=routed,
        present=present,
    )


def _layer_facts(
    routing: Routing, routed: jax.Array | None, present: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """`routed` and `present` as float32 arrays; None stands for a layer with all experts."""
    routed = jnp.ones((), jnp.float32) if routed is None else routed.astype(jnp.float32)
    if present is None:
        return routed, jnp.ones(routing.router_logits.shape[-1], jnp.float32)
    return routed, present.astype(jnp.float32)


def sow_routing(
    module: nn.Module,
    routing: Routing,
    token_mask: jax.Array,
    *,
    routed: jax.Array | None = None,
    present: jax.Array | None = None,
    expert_groups: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> None:
    """Sows the statistics of a routed module, and each token's routing if `routing` is mutable.

    Args:
      module: the routed module.
      routing, token_mask, routed, present, expert_groups, segment_ids: see `router_statistics`.
    """
    options: dict[str, Any] = {"routed": routed, "present": present}
    sequences = {"expert_groups": expert_groups, "segment_ids": segment_ids}
    _sow(module, ROUTER, STATISTICS, router_statistics(routing, token_mask, **options, **sequences))
    if module.is_mutable_collection(ROUTING) and not module.is_initializing():
        _sow(module, ROUTING, TOKENS, token_routing(routing, token_mask, **options))


def _sow(module: nn.Module, collection: str, name: str, value: Any) -> None:
    """Sows `value` itself, where Linen's default is a tuple of all values sown so far."""
    nothing: Any = None
    module.sow(collection, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: nothing)


def collect_routing(sown: Mapping[str, Any]) -> dict[str, dict[str, TokenRouting]]:
    """Token routing of each adapter, `{adapter: {site: routing}}`, with a leading axis L.

    Args:
      sown: variables returned by `apply(..., mutable=["routing"])`.

    Raises:
      ValueError: the collection is missing; see `collect_statistics`.
    """
    return _collect(sown, ROUTING, TOKENS)


def _collect(sown: Mapping[str, Any], collection: str, leaf: str) -> dict[str, dict[str, Any]]:
    if collection not in sown:
        raise ValueError(f"no {collection!r} collection was sown; apply the model with it mutable")
    collected: dict[str, dict[str, Any]] = {}
    for name, tree in split_by_adapter(sown[collection]).items():
        values: Any = flatten_dict(tree)
        for path, value in values.items():
            site = "/".join(part for part in path if part not in ("layers", leaf))
            collected.setdefault(name, {})[site] = value
    return collected
