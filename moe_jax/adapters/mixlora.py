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

Two slots are unrolled. For a 7B step compiled for an H200, `benchmarks/gpu_step.py` estimates 147.9
ms with two unrolled slots, 149.1 ms with a loop over the slots, and 152.0 ms with an axis C in the
hidden activations (29 November 2026).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
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
from moe_jax.adapters.tree import ATTENTION_MODULES, MLP_MODULES
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import field_prefix, require
from moe_jax.layers.activation import gated
from moe_jax.layers.dropout import dropout
from moe_jax.layers.frozen import frozen_product
from moe_jax.layers.names import LOW_RANK, NARROW_PRODUCT
from moe_jax.layers.quantized import Kernel
from moe_jax.sharding.axes import EMBED, MLP

MAX_UNROLLED_SLOTS = 2
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
        with field_prefix("router"):
            self.router.check(self.num_experts)
        check_losses(self.losses, self.num_experts)

    def check_model(self, model: ModelConfig) -> None:
        with field_prefix("router"):
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


@dataclass(frozen=True)
class SlotInputs:
    """Inputs that all expert slots share; see the letters above.

    Attributes:
      gate: frozen product x W_gate, [T, F], without its bias.
      up: frozen product x W_up, [T, F], without its bias.
      gate_bias, up_bias: [F]; None without a bias.
      activation: activation function of the gate.
      down_kernel: frozen W_down [F, D], for DoRA on `down_proj`; None without it.
      hidden_dropout: share of h_c that is dropped, a scalar; None for none.
      down_dropout: share of h_c that the pair of `down_proj` does not see, a scalar; None for none.
    """

    gate: jax.Array
    up: jax.Array
    gate_bias: jax.Array | None
    up_bias: jax.Array | None
    activation: Callable[[jax.Array], jax.Array]
    down_kernel: Kernel | None
    hidden_dropout: jax.Array | None
    down_dropout: jax.Array | None


def expert_slot(
    inputs: SlotInputs,
    pairs: Mapping[str, ExpertPairs],
    z: Mapping[str, jax.Array],
    dispatch: jax.Array,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """One slot of every token.

    Args:
      inputs: inputs of all slots.
      pairs: low-rank pairs that the slot selects from, by projection.
      z: low-rank activations [T, E, R] of the adapted ones of `gate_proj` and `up_proj`.
      dispatch: [T, E], one-hot; zero for a token whose slot has no expert, which then is the frozen
        FFN.
      weights: [T].
      keys: two dropout keys; None drops nothing.

    Returns:
      The weighted hidden activation h_c [T, F], and the low-rank activations of the slot's expert
      on `down_proj`, [T, E, R], None if it is not adapted. With DoRA on `down_proj` the first is
      the slot's output [T, D] instead, since DoRA rescales the down projection of each expert.
    """

    def adapt(target: str, product: jax.Array, bias: jax.Array | None) -> jax.Array:
        if target in pairs:
            selected = jnp.einsum("ter,te->ter", z[target], dispatch.astype(product.dtype))
            lora_b = pairs[target].lora_b.astype(product.dtype)
            # With DoRA, `lora_b` contains the gains already; without, `rescale` changes nothing.
            product = pairs[target].rescale(product, dispatch)
            product = product + jnp.einsum("ter,erf->tf", selected, lora_b)
        return product if bias is None else product + bias[None]

    gate = adapt("gate_proj", inputs.gate, inputs.gate_bias)
    up = adapt("up_proj", inputs.up, inputs.up_bias)
    hidden = gated(inputs.activation, gate, up, weights.astype(gate.dtype)[:, None])
    if keys is not None and inputs.hidden_dropout is not None:
        hidden = dropout(hidden, inputs.hidden_dropout, keys[0])
    if "down_proj" not in pairs:
        return hidden, None
    down, dropped = pairs["down_proj"], hidden
    if keys is not None and inputs.down_dropout is not None:
        dropped = dropout(hidden, inputs.down_dropout, keys[1])
    z_down = down.activations(dropped)
    z_down = jnp.einsum("ter,te->ter", z_down, dispatch.astype(hidden.dtype))
    if inputs.down_kernel is None:
        return hidden, z_down
    product = checkpoint_name(frozen_product(hidden, inputs.down_kernel), NARROW_PRODUCT)
    return down.rescale(product, dispatch), z_down


def expert_slots(
    inputs: SlotInputs,
    pairs: Mapping[str, ExpertPairs],
    z: Mapping[str, jax.Array],
    dispatch: jax.Array | None,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The sum of all slots; see `expert_slot` for the two results, the second for all E experts.

    Args:
      inputs, pairs, z: see `expert_slot`.
      dispatch: [T, C, E]; None where slot c is expert c for every token (C = E).
      weights: [T, C].
      keys: two dropout keys for each slot, [C, 2]; None drops nothing.
    """
    stacked: dict[str, Any] = {"weights": weights.T, "keys": keys}
    if dispatch is None:  # each slot selects from one pair, always that pair
        stacked["pairs"] = {target: pair.experts_first() for target, pair in pairs.items()}
        stacked["z"] = {target: jnp.moveaxis(z[target], 1, 0)[:, :, None] for target in z}
        stacked["dispatch"] = jnp.ones_like(stacked["weights"])[..., None]
        slot = functools.partial(expert_slot, inputs)
    else:  # one-hot vectors have no gradient
        stacked["dispatch"] = jax.lax.stop_gradient(jnp.moveaxis(dispatch, 1, 0))
        slot = functools.partial(expert_slot, inputs, pairs, z)

    def add_slot(total: jax.Array, slot_inputs: Any) -> tuple[jax.Array, jax.Array | None]:
        output, z_down = slot(**slot_inputs)
        return total + output, z_down

    num_slots = weights.shape[1]
    if num_slots > MAX_UNROLLED_SLOTS:
        policy = jax.checkpoint_policies.save_only_these_names(NARROW_PRODUCT)
        add_slot = jax.checkpoint(add_slot, policy=policy)
    wide = inputs.gate if inputs.down_kernel is None else inputs.down_kernel
    zeros = jnp.zeros((len(inputs.gate), wide.shape[-1]), inputs.gate.dtype)
    unroll = num_slots if num_slots <= MAX_UNROLLED_SLOTS else 1
    total, z_down = jax.lax.scan(add_slot, zeros, stacked, unroll=unroll)
    if z_down is None:
        return total, None
    if dispatch is None:
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
        dropped = x
        if low_rank.dropout and not deterministic:
            dropped = dropout(x, low_rank.dropout, self.make_rng("dropout"))
        inputs = {target: pair for target, pair in pairs.items() if target != "down_proj"}
        z = checkpoint_name(joint_activations(_flat(dropped), inputs), LOW_RANK)
        dispatch = None if routing.dispatch is None else _flat(routing.dispatch)
        weights = _flat(routing.weights)
        keys, hidden_dropout, down_dropout = self._dropout_settings(
            context, weights.shape[-1], deterministic
        )
        dora_down = "down_proj" in pairs and pairs["down_proj"].gains is not None
        slot_inputs = SlotInputs(
            gate=_flat(ffn.gate.product),
            up=_flat(ffn.up.product),
            gate_bias=ffn.gate_bias,
            up_bias=ffn.up_bias,
            activation=ffn.activation,
            down_kernel=ffn.down_kernel if dora_down else None,
            hidden_dropout=hidden_dropout,
            down_dropout=down_dropout,
        )
        total, z_down = expert_slots(slot_inputs, pairs, z, dispatch, weights, keys)

        output = _bias_and_bypass(x, ffn, routing)
        if z_down is not None:
            z_down = checkpoint_name(z_down, LOW_RANK)
            output = output + pairs["down_proj"].expand(z_down).reshape(x.shape)
        total = total.reshape(*x.shape[:-1], -1)
        if dora_down:
            return FFNUpdate(hidden=None, output=output + total)
        return FFNUpdate(hidden=total, output=output)

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
            routing = routing.masked_by_layer(routed)
        # Kept for the backward pass: the routing is small and slow to compute again.
        dispatch, weights = checkpoint_name((routing.dispatch, routing.weights), LOW_RANK)
        return routing._replace(dispatch=dispatch, weights=weights)

    def _dropout_settings(
        self, context: AdapterContext, slots: int, deterministic: bool
    ) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
        """Dropout keys [C, 2] and rates of `SlotInputs`, all zero in layers without routing."""
        rates = self.method.ffn_dropout, self.method.expert_low_rank.dropout
        if deterministic or not any(rates):
            return None, None, None
        routed = self.method.router.routes_layer(context.layer_index)
        share = jnp.float32(1.0) if routed is None else routed.astype(jnp.float32)
        two_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys = jax.random.split(self.make_rng("dropout"), slots)
        keys = jax.vmap(two_keys, in_axes=(0, None))(keys, jnp.arange(2))
        hidden, down = (rate * share if rate else None for rate in rates)
        return keys, hidden, down


def _flat(array: jax.Array) -> jax.Array:
    """Rows and positions as one axis of tokens: [B, S, ...] to [T, ...]."""
    return array.reshape(-1, *array.shape[2:])


def _bias_and_bypass(x: jax.Array, ffn: FrozenFFN, routing: Routing) -> jax.Array:
    """The part of the output [B, S, D] from the bias of the down projection and from a bypass."""
    output = jnp.zeros_like(x)
    if ffn.down_bias is not None:  # every expert has it; the frozen projection adds it once
        weight = jnp.sum(routing.weights, axis=-1, keepdims=True) - 1.0
        output = output + weight.astype(x.dtype) * ffn.down_bias.astype(x.dtype)[None, None]
    if routing.bypass is not None:
        output = output + routing.bypass[..., None].astype(x.dtype) * x
    return output
