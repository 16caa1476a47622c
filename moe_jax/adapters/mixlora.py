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

`moe_jax.adapters.expert_slots` computes the slots, `moe_jax.adapters.fused_slots` in GPU kernels.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.expert_slots import SlotInputs, expert_slots
from moe_jax.adapters.fused_slots import fused_expert_slots, require_fusible
from moe_jax.adapters.lora.lora import Lora
from moe_jax.adapters.lora.low_rank import (
    ExpertLora,
    LowRankConfig,
    joint_activations,
)
from moe_jax.adapters.method import METHODS, AdapterContext, AdapterMethod, FFNUpdate, FrozenFFN
from moe_jax.adapters.routing.losses import RouterLoss, check_losses
from moe_jax.adapters.routing.router import Router, RouterLogits, Routing, route_with_cache
from moe_jax.adapters.routing.statistics import sow_routing
from moe_jax.adapters.routing.strategies import TopKRouter
from moe_jax.adapters.tree import MLP_MODULES
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import field_prefix, require
from moe_jax.layers.dropout import dropout
from moe_jax.layers.names import LOW_RANK
from moe_jax.layers.quantized import Kernel
from moe_jax.sharding.axes import EMBED, MLP


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
        super().check_model(model)
        with field_prefix("router"):
            self.router.check_depth(model.num_layers)

    @property
    def is_additive(self) -> bool:
        return not self.dora and not self.expert_low_rank.dora

    @property
    def routes(self) -> bool:
        return True

    @property
    def routes_by_sequence(self) -> bool:
        return self.router.limits_load

    @property
    def router_losses(self) -> Mapping[str, RouterLoss]:
        return self.losses

    @property
    def expert_low_rank(self) -> LowRankConfig:
        """Settings of the experts' pairs."""
        changed = {k: v for k, v in vars(self.expert_lora).items() if v is not None}
        return dataclasses.replace(self.low_rank, **changed)

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        adapted = target in self.target_modules and target not in MLP_MODULES
        return Lora(self.low_rank, axes) if adapted else None

    def mlp_adapter(self) -> nn.Module | None:
        return MixLoraFFN(self)


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
            dropped = dropout(x, low_rank.dropout, context.input_key())
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
        if context.fused_experts:
            drops = bool(method.ffn_dropout)
            require_fusible(slot_inputs, pairs, dispatch, drops_hidden=drops)
            total, z_down = fused_expert_slots(slot_inputs, pairs, z, dispatch, weights, keys)
        else:
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
        routing = route_with_cache(
            self, router, logits, mask, context.segment_ids, context.prompt_length
        )
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
