"""MixLoRA: a frozen FFN with LoRA experts, of which a router selects a few for each token.

Source: arXiv:2404.15159, eqs. 3 to 8. Letters of the einsums below:

    t  T = B S tokens      d  D model width      e  E experts      c  C expert slots (top-k)
                           f  F FFN width        r  R rank         s = alpha / R

The router gives each token a one-hot `dispatch` [T, C, E] and the `weights` [T, C] of its slots.
All experts share the frozen products `x W_gate` and `x W_up`. Slot c adds the deltas of its expert:

    z_gate = s x A_gate                                     "td,der->ter"   for all experts at once
    gate_c = x W_gate + (dispatch_c * z_gate) B_gate        "ter,te->ter", "ter,erf->tf"
    up_c   = x W_up   + (dispatch_c * z_up) B_up
    h_c    = weights_c * act(gate_c) * up_c

The down projection is linear and shared, so that the slots are summed before it:

    y = (sum_c h_c) W_down + (sum_c dispatch_c * (s h_c A_down)) B_down

This equals evaluating each selected expert as a whole FFN and adding up the weighted outputs. The
dispatch acts on the low-rank activations z, E R numbers a token, and not on the tokens: shapes are
static and no token is gathered, sorted or dropped. `tests/adapters/test_routed_ffn.py` compares it
with whole experts in PyTorch.

Two slots are written out side by side. `benchmarks/gpu_step.py` models a 7B step compiled for an
H200 at 147.9 ms so, at 149.1 ms with the slots in a loop, and at 152.0 ms with an axis C in the
hidden activations (29 November 2026; an estimate).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.lora.lora import Lora
from moe_jax.adapters.lora.low_rank import (
    ExpertLora,
    ExpertPairs,
    LowRankConfig,
    joint_activations,
)
from moe_jax.adapters.method import METHODS, AdapterContext, AdapterMethod, FFNUpdate, FrozenFFN
from moe_jax.adapters.routing.losses import RouterLoss, check_losses
from moe_jax.adapters.routing.router import Router, RouterLogits, Routing, route_with_cache
from moe_jax.adapters.routing.statistics import sow_routing
from moe_jax.adapters.routing.strategies import TopKRouter
from moe_jax.adapters.token_blocks import map_token_blocks, token_dropout
from moe_jax.adapters.tree import ATTENTION_MODULES, MLP_MODULES
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import require, within
from moe_jax.layers.activation import gated
from moe_jax.layers.names import LOW_RANK, NARROW_PRODUCT
from moe_jax.layers.quantized import Kernel, frozen_product
from moe_jax.sharding.axes import EMBED, MLP

WRITTEN_OUT = 2
"""Largest number of slots that the program holds side by side. More slots are the steps of a loop,
whose backward pass recomputes each step, so that memory does not grow with their number."""


@dataclass(frozen=True, kw_only=True)
class ExpertLoraConfig:
    """Settings of the experts' pairs that differ from those on attention; None keeps the latter."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    rslora: bool | None = None
    dora: bool | None = None

    def __post_init__(self):
        require(self.rank is None or self.rank > 0, "rank", "must be positive")
        require(self.alpha is None or self.alpha > 0, "alpha", "must be positive")
        require(self.dropout is None or 0.0 <= self.dropout < 1.0, "dropout", "must lie in [0, 1)")


@METHODS.register("mixlora")
@dataclass(frozen=True, kw_only=True)
class MixLoraConfig(AdapterMethod):
    """MixLoRA: LoRA on the targeted attention projections, experts on the targeted FFN projections.

    With `dora`, both are DoRA (the paper's MixDoRA).

    Attributes:
      num_experts: E.
      router: the routing strategy, chosen by `router.name`.
      expert_lora: rank, alpha, dropout and kind of the experts' pairs, where they differ from those
        on attention.
      ffn_dropout: share of an expert's hidden activation (the gated product before the down
        projection) that is dropped during training, by a mask of its own for each expert.
        transformers' Switch experts drop there too; MoE-PEFT drops from the FFN's output.
      losses: auxiliary losses of the router by name, for example `load_balance`.
    """

    num_experts: int
    router: Router = field(default_factory=TopKRouter)
    expert_lora: ExpertLoraConfig = ExpertLoraConfig()
    ffn_dropout: float = 0.0
    losses: Mapping[str, RouterLoss] = field(default_factory=FrozenDict)

    def __post_init__(self):
        super().__post_init__()
        require(
            any(target in MLP_MODULES for target in self.target_modules),
            "target_modules",
            f"MixLoRA needs at least one of {', '.join(MLP_MODULES)}; without experts use 'lora'",
        )
        require(self.num_experts > 1, "num_experts", "must be at least 2; for one use 'lora'")
        require(0.0 <= self.ffn_dropout < 1.0, "ffn_dropout", "must lie in [0, 1)")
        with within("router"):
            self.router.check(self.num_experts)
        check_losses(self.losses, self.num_experts)

    def check_model(self, model: ModelConfig) -> None:
        with within("router"):
            self.router.check_depth(model.num_layers)

    @property
    def routes(self) -> bool:
        return True

    @property
    def router_losses(self) -> Mapping[str, RouterLoss]:
        return self.losses

    @property
    def expert_low_rank(self) -> LowRankConfig:
        """Settings of the experts' pairs."""
        changed = {k: v for k, v in vars(self.expert_lora).items() if v is not None}
        return dataclasses.replace(self.low_rank, **changed)

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        adapted = target in self.target_modules and target in ATTENTION_MODULES
        return Lora(self.low_rank, axes) if adapted else None

    def mlp_adapter(self) -> nn.Module | None:
        return MixLoraFFN(self)


@flax.struct.dataclass
class RoutedTokens:
    """Inputs of the experts; every array has the tokens as its leading axis.

    Attributes:
      gate: frozen product x W_gate, [T, F], without its bias.
      up: frozen product x W_up, [T, F], without its bias.
      z: low-rank activations of the adapted ones of `gate_proj` and `up_proj`, [T, E, R].
      dispatch: [T, C, E], one-hot, or zero for a slot without an expert, which then is the frozen
        FFN. None where slot c is expert c for every token (C = E).
      weights: [T, C].
      index: int32 [T], the position of each token in the batch; dropout masks depend on it alone.
    """

    gate: jax.Array
    up: jax.Array
    z: dict[str, jax.Array]
    dispatch: jax.Array | None
    weights: jax.Array
    index: jax.Array


@flax.struct.dataclass
class ExpertFFN:
    """Weights and settings that all tokens share.

    Attributes:
      pairs: low-rank pairs of the adapted projections.
      gate_bias, up_bias: [F]; None without a bias.
      down_kernel: frozen W_down [F, D], for DoRA on `down_proj`; None without it.
      dropout_keys: two keys for each slot, [C, 2]; None where nothing is dropped.
      hidden_dropout: share of h_c that is dropped, a scalar; None for none.
      down_dropout: share of h_c that the pair of `down_proj` does not see, a scalar; None for none.
      activation: activation function of the gate.
    """

    pairs: dict[str, ExpertPairs]
    gate_bias: jax.Array | None
    up_bias: jax.Array | None
    down_kernel: Kernel | None
    dropout_keys: jax.Array | None
    hidden_dropout: jax.Array | None
    down_dropout: jax.Array | None
    activation: Callable[[jax.Array], jax.Array] = flax.struct.field(pytree_node=False)


def expert_slot(
    tokens: RoutedTokens,
    ffn: ExpertFFN,
    pairs: Mapping[str, ExpertPairs],
    z: Mapping[str, jax.Array],
    dispatch: jax.Array,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """One slot of every token.

    Args:
      tokens: inputs of all slots.
      ffn: frozen weights and settings.
      pairs: the pairs that the slot chooses from.
      z: low-rank activations [T, E, R] of these pairs.
      dispatch: [T, E].
      weights: [T].
      keys: two dropout keys.

    Returns:
      The weighted hidden activation h_c [T, F], and the low-rank activations of the slot's expert
      on `down_proj`, [T, E, R], None if it is not adapted. With DoRA on `down_proj` the first is
      the slot's output [T, D] instead, since DoRA rescales the down projection of each expert.
    """

    def adapted(target: str, product: jax.Array, bias: jax.Array | None) -> jax.Array:
        if target in pairs:
            selected = jnp.einsum("ter,te->ter", z[target], dispatch.astype(product.dtype))
            lora_b = pairs[target].lora_b.astype(product.dtype)
            product = pairs[target].rescale(product, dispatch)  # DoRA only
            product = product + jnp.einsum("ter,erf->tf", selected, lora_b)
        return product if bias is None else product + bias[None]

    gate = adapted("gate_proj", tokens.gate, ffn.gate_bias)
    up = adapted("up_proj", tokens.up, ffn.up_bias)
    hidden = gated(ffn.activation, gate, up, weights.astype(gate.dtype)[:, None])
    hidden = token_dropout(
        hidden, ffn.hidden_dropout, None if keys is None else keys[0], tokens.index
    )
    if "down_proj" not in pairs:
        return hidden, None
    down = pairs["down_proj"]
    seen = token_dropout(hidden, ffn.down_dropout, None if keys is None else keys[1], tokens.index)
    z_down = jnp.einsum("ter,te->ter", down.activations(seen), dispatch.astype(hidden.dtype))
    if ffn.down_kernel is None:
        return hidden, z_down
    product = checkpoint_name(frozen_product(hidden, ffn.down_kernel), NARROW_PRODUCT)
    return down.rescale(product, dispatch), z_down


def expert_slots(tokens: RoutedTokens, ffn: ExpertFFN) -> tuple[jax.Array, jax.Array | None]:
    """The sum of all slots; see `expert_slot` for the two results, the second for all E experts."""
    stacked: dict[str, Any] = {"weights": tokens.weights.T, "keys": ffn.dropout_keys}
    if tokens.dispatch is None:  # slot c is expert c: one pair to choose from, and it is chosen
        stacked["pairs"] = {name: pair.experts_first() for name, pair in ffn.pairs.items()}
        stacked["z"] = {name: jnp.moveaxis(z, 1, 0)[:, :, None] for name, z in tokens.z.items()}
        stacked["dispatch"] = jnp.ones_like(stacked["weights"])[..., None]
        slot = functools.partial(expert_slot, tokens, ffn)
    else:
        stacked["dispatch"] = jax.lax.stop_gradient(jnp.moveaxis(tokens.dispatch, 1, 0))
        slot = functools.partial(expert_slot, tokens, ffn, pairs=ffn.pairs, z=tokens.z)

    def add_slot(total: jax.Array, own: Any) -> tuple[jax.Array, jax.Array | None]:
        more, z_down = slot(**own)
        return total + more, z_down

    count = tokens.weights.shape[1]
    if count > WRITTEN_OUT:
        keep = jax.checkpoint_policies.save_only_these_names(NARROW_PRODUCT)
        add_slot = jax.checkpoint(add_slot, policy=keep)
    width = ffn.down_kernel.shape[-1] if ffn.down_kernel is not None else tokens.gate.shape[-1]
    zeros = jnp.zeros((len(tokens.gate), width), tokens.gate.dtype)
    unroll = count if count <= WRITTEN_OUT else 1
    total, z_down = jax.lax.scan(add_slot, zeros, stacked, unroll=unroll)
    if z_down is None:
        return total, None
    if tokens.dispatch is None:
        return total, jnp.moveaxis(jnp.squeeze(z_down, 2), 0, 1)
    return total, jnp.sum(z_down, axis=0)


class MixLoraFFN(nn.Module):
    """The routed FFN of one adapter.

    Leaves: `router/kernel` [D, E], and the pairs of each targeted projection; see `ExpertLora`.
    """

    method: MixLoraConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, ffn: FrozenFFN, context: AdapterContext, *, deterministic: bool
    ) -> FFNUpdate:
        """See `AdapterMethod.mlp_adapter`."""
        method, low_rank = self.method, self.method.expert_low_rank
        routing = self._route(x, context, deterministic)
        frozen: dict[str, tuple[Kernel, tuple[str, str]]] = {
            "gate_proj": (ffn.gate.kernel, (EMBED, MLP)),
            "up_proj": (ffn.up.kernel, (EMBED, MLP)),
            "down_proj": (ffn.down_kernel, (MLP, EMBED)),
        }
        pairs = {
            target: ExpertLora(low_rank, method.num_experts, axes, name=target)(kernel)
            for target, (kernel, axes) in frozen.items()
            if target in method.target_modules
        }
        # One dropout mask for all experts of a token, and one product for gate and up.
        seen = nn.Dropout(low_rank.dropout, deterministic=deterministic)(x)
        inputs = {target: pair for target, pair in pairs.items() if target != "down_proj"}
        z = checkpoint_name(joint_activations(_flat(seen), inputs), LOW_RANK)
        tokens = RoutedTokens(
            gate=_flat(ffn.gate.product),
            up=_flat(ffn.up.product),
            z=z,
            dispatch=None if routing.dispatch is None else _flat(routing.dispatch),
            weights=_flat(routing.weights),
            index=jnp.arange(x.shape[0] * x.shape[1], dtype=jnp.int32),
        )
        dora_down = "down_proj" in pairs and pairs["down_proj"].gains is not None
        experts = ExpertFFN(
            pairs,
            *(ffn.gate_bias, ffn.up_bias, ffn.down_kernel if dora_down else None),
            *self._dropout(context, routing.weights.shape[-1], deterministic),
            activation=ffn.activation,
        )
        if context.block_tokens is None or dora_down:  # in blocks, W_down would be read once each
            total, z_down = expert_slots(tokens, experts)
        else:
            shape = context.block_tokens, context.shards
            total, z_down = map_token_blocks(expert_slots, tokens, experts, *shape)

        output = _output_beside_experts(x, ffn, routing)
        if z_down is not None:
            z_down = checkpoint_name(z_down, LOW_RANK)
            output = output + pairs["down_proj"].expand(z_down).reshape(x.shape)
        total = total.reshape(*x.shape[:-1], -1)
        return FFNUpdate(None, output + total) if dora_down else FFNUpdate(total, output)

    def _route(self, x: jax.Array, context: AdapterContext, deterministic: bool) -> Routing:
        router, mask = self.method.router, context.token_mask
        logits = RouterLogits(router, self.method.num_experts, EMBED, name="router")(
            x, deterministic=deterministic
        )
        routing = route_with_cache(self, router, logits, mask, context.segment_ids)
        routed = router.routes_layer(context.layer_index)
        sow_routing(
            self,
            routing,
            mask,
            routed=routed,
            expert_groups=context.expert_groups,
            segment_ids=context.segment_ids,
        )
        if routed is not None:
            routing = routing.where(routed)
        # As small as the low-rank activations, and slow to compute again.
        dispatch, weights = checkpoint_name((routing.dispatch, routing.weights), LOW_RANK)
        return routing._replace(dispatch=dispatch, weights=weights)

    def _dropout(
        self, context: AdapterContext, slots: int, deterministic: bool
    ) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
        """Two keys for each slot, and the rates of `ExpertFFN`; a layer left frozen drops
        nothing.
        """
        rates = self.method.ffn_dropout, self.method.expert_low_rank.dropout
        if deterministic or not any(rates):
            return None, None, None
        routed = self.method.router.routes_layer(context.layer_index)
        share = jnp.float32(1.0) if routed is None else routed.astype(jnp.float32)
        keys = jax.random.split(self.make_rng("dropout"), (slots, 2))
        hidden, down = (rate * share if rate else None for rate in rates)
        return keys, hidden, down


def _flat(array: jax.Array) -> jax.Array:
    """Rows and positions as one axis of tokens: [B, S, ...] to [T, ...]."""
    return array.reshape(-1, *array.shape[2:])


def _output_beside_experts(x: jax.Array, ffn: FrozenFFN, routing: Routing) -> jax.Array:
    """The part of the output [B, S, D] from the bias of the down projection and from a bypass."""
    output = jnp.zeros_like(x)
    if ffn.down_bias is not None:  # every expert has it; the frozen projection adds it once
        weight = jnp.sum(routing.weights, axis=-1, keepdims=True) - 1.0
        output = output + weight.astype(x.dtype) * ffn.down_bias.astype(x.dtype)[None, None]
    if routing.bypass is not None:
        output = output + routing.bypass[..., None].astype(x.dtype) * x
    return output
