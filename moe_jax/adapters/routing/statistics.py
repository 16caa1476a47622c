"""What a routed layer reports of its decisions: sums over tokens, from which losses are computed.

Sums, not means: they add up over devices and layers, and nothing is divided before the number of
real tokens is known.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from moe_jax.adapters.routing.router import Routing
from moe_jax.adapters.tree import by_adapter
from moe_jax.layers.names import ROUTER, ROUTING
from moe_jax.layers.tokens import sequence_sums

STATISTICS = "statistics"


class SequenceStatistics(NamedTuple):
    """What each of a batch's sequences got of each expert in one layer, float32.

    There are N places for sequences: one for each row, or where rows hold several sequences, one
    for each token, of which those of the sequences' last tokens are taken.

    Attributes:
      weights: [N, E], mean weight of the expert over the sequence's real tokens.
      group: [N], the group of experts that the sequence belongs to.
      real: [N], 1 for a sequence, 0 for a place without one; its weights are 0 then.
    """

    weights: jax.Array
    group: jax.Array
    real: jax.Array


class RouterStatistics(NamedTuple):
    """Sums over the real tokens of one layer, float32; padding is not in them.

    Under the scan over layers each field has a leading axis L.

    Attributes:
      routed: [], 1 if the layer routes, 0 if it was left frozen; its sums are 0 then.
      present: [E], 1 for the experts that the layer has.
      tokens: [], number of tokens.
      load_sum: [E], sum of `Routing.load`: tokens that went to the expert. Carries no gradient.
      probability_sum: [E], sum of router probabilities.
      weight_sum: [E], sum of the weights that the experts got.
      squared_logsumexp_sum: [], sum of squared log-partition functions of the router logits.
      entropy_sum: [], sum of the router distributions' entropies in nats.
      sequences: the same by sequence; None unless a loss of the adapter reads it.
      overflow_sum: [], tokens whose expert had no capacity left; None if capacity is unlimited.
    """

    routed: jax.Array
    present: jax.Array
    tokens: jax.Array
    load_sum: jax.Array
    probability_sum: jax.Array
    weight_sum: jax.Array
    squared_logsumexp_sum: jax.Array
    entropy_sum: jax.Array
    sequences: SequenceStatistics | None = None
    overflow_sum: jax.Array | None = None

    @property
    def num_experts(self) -> jax.Array:
        """How many experts the layer has."""
        return jnp.sum(self.present, axis=-1)

    def pooled(self) -> "RouterStatistics":
        """All layers as one; they must have the same experts."""
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
      routing: the router's decision.
      token_mask: bool [B, S], false at padding.
      routed: bool [], false if the layer is left frozen; None stands for true.
      present: bool [E], the experts that the layer has; None stands for all.
      expert_groups: int [B, S], the group of each token's sequence, 0 at padding; None leaves the
        sequences out.
      segment_ids: int [B, S] as in `Batch`; None where every row is one sequence.
    """
    sequences = None
    routed, present = _layer_facts(routing, routed, present)
    mask = token_mask.astype(jnp.float32) * routed
    log_probs = jax.nn.log_softmax(routing.router_logits, axis=-1)
    entropy = -jnp.sum(routing.router_probs * log_probs, axis=-1)
    logsumexp = jax.nn.logsumexp(routing.router_logits, axis=-1)
    if expert_groups is not None and segment_ids is None:
        sequences = _of_rows(routing, mask, expert_groups)
    elif expert_groups is not None and segment_ids is not None:
        sequences = _of_segments(routing, mask, expert_groups, segment_ids)
    return RouterStatistics(
        routed=routed,
        present=present,
        tokens=jnp.sum(mask),
        load_sum=jax.lax.stop_gradient(jnp.einsum("bs,bse->e", mask, routing.load) * present),
        probability_sum=jnp.einsum("bs,bse->e", mask, routing.router_probs),
        weight_sum=jnp.einsum("bs,bse->e", mask, routing.combine),
        squared_logsumexp_sum=jnp.sum(mask * jnp.square(logsumexp)),
        entropy_sum=jnp.sum(mask * entropy),
        sequences=sequences,
        overflow_sum=None if routing.overflow is None else jnp.sum(mask * routing.overflow),
    )


def _of_rows(routing: Routing, mask: jax.Array, expert_groups: jax.Array) -> SequenceStatistics:
    """Of rows of one sequence each."""
    tokens = jnp.sum(mask, axis=-1)
    weights = jnp.einsum("bs,bse->be", mask, routing.combine)
    return SequenceStatistics(
        weights=weights / jnp.maximum(tokens, 1.0)[:, None],
        group=jnp.max(expert_groups, axis=-1).astype(jnp.float32),  # 0 at padding
        real=jnp.minimum(tokens, 1.0),
    )


def _of_segments(
    routing: Routing, mask: jax.Array, expert_groups: jax.Array, segment_ids: jax.Array
) -> SequenceStatistics:
    """Of rows that hold several sequences; how many is not known when this is compiled."""
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
    """The statistics of each adapter, `{adapter: {site: statistics}}`, each with a leading axis L.

    A site is where the routers sit in a layer, for example `mlp/moe` or `self_attn/q_proj`.

    Args:
      sown: the variables that `apply(..., mutable=["router"])` returned.

    Raises:
      ValueError: the collection is missing. Sowing is silent where a collection is not mutable, so
        its absence is a defect of the caller and never means "no routers".
    """
    return _collect(sown, ROUTER, STATISTICS)


TOKENS = "tokens"


class TokenRouting(NamedTuple):
    """The decisions of one layer's router, float32; zero at padding and in a layer left frozen.

    Under the scan over layers each field has a leading axis L.

    Attributes:
      weights: [B, S, E], each expert's share of the token's output.
      probabilities: [B, S, E], the router's own, before experts are chosen.
      load: [B, S, E], see `Routing.load`: 1 for a chosen expert, the weight where all share.
      routed: [], 1 if the layer routes, 0 if it was left frozen.
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
    """The decisions of each adapter, `{adapter: {site: decisions}}`, each with a leading axis L.

    Args:
      sown: the variables that `apply(..., mutable=["routing"])` returned.

    Raises:
      ValueError: the collection is missing. Sowing is silent where a collection is not mutable, so
        its absence is a defect of the caller or of a method, and never means "no routers".
    """
    return _collect(sown, ROUTING, TOKENS)


def _collect(sown: Mapping[str, Any], collection: str, leaf: str) -> dict[str, dict[str, Any]]:
    if collection not in sown:
        raise ValueError(f"no {collection!r} collection was sown; apply the model with it mutable")
    collected: dict[str, dict[str, Any]] = {}
    for name, tree in by_adapter(sown[collection]).items():
        values: Any = flatten_dict(tree)
        for path, value in values.items():
            site = "/".join(part for part in path if part not in ("layers", leaf))
            collected.setdefault(name, {})[site] = value
    return collected
