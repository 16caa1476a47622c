"""MixLoRA: an FFN whose experts are LoRA deltas on one frozen FFN (arXiv:2404.15159)."""

import dataclasses
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.in_turn import in_turn
from moe_jax.adapters.lora.lora import Lora
from moe_jax.adapters.lora.low_rank import ExpertPairs, LoraB, LowRankConfig, joint_codes
from moe_jax.adapters.method import METHODS, AdapterContext, AdapterMethod, Finish, FrozenFFN
from moe_jax.adapters.routing.losses import RouterLoss, check_losses
from moe_jax.adapters.routing.router import Router, RouterLogits, Routing, route_and_count
from moe_jax.adapters.routing.statistics import router_statistics, sow_statistics
from moe_jax.adapters.routing.strategies import TopKRouter
from moe_jax.adapters.routing.token_routing import sow_routing
from moe_jax.adapters.slots import Slot, SlotInputs, SlotResult
from moe_jax.adapters.tree import ATTENTION_MODULES, MLP_MODULES
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import require, within
from moe_jax.layers.names import CODES, NARROW_PRODUCT
from moe_jax.layers.quantized import frozen_product
from moe_jax.layers.token_axes import TokenAxes
from moe_jax.sharding.axes import EMBED, MLP


@dataclass(frozen=True, kw_only=True)
class ExpertLoraConfig:
    """What differs for the experts from the LoRA on attention; None keeps the common value."""

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
    """MixLoRA: LoRA on the targeted attention projections, experts on the targeted FFN ones.

    With `dora`, both are DoRA (the paper's MixDoRA).

    Attributes:
      num_experts: E.
      router: the routing strategy, chosen by `router.name`.
      expert_lora: the experts' own rank, alpha, dropout and kind.
      ffn_dropout: share of an expert's hidden activation, that is of the gated product that its
        down projection takes, that is dropped while training, each expert dropping its own.
        transformers' Switch experts have it there too; MoE-PEFT drops from the FFN's output.
      losses: the router's auxiliary losses by name, for example `load_balance`.
    """

    num_experts: int
    router: Router = field(default_factory=TopKRouter)
    expert_lora: ExpertLoraConfig = ExpertLoraConfig()
    ffn_dropout: float = 0.0
    losses: dict[str, RouterLoss] = field(default_factory=dict)

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
    def router_losses(self) -> dict[str, RouterLoss]:
        return self.losses

    @property
    def expert_low_rank(self) -> LowRankConfig:
        """The experts' pairs."""
        own = {k: v for k, v in vars(self.expert_lora).items() if v is not None}
        return dataclasses.replace(self.low_rank, **own)

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        adapted = target in self.target_modules and target in ATTENTION_MODULES
        return Lora(self.low_rank, axes) if adapted else None

    def mlp_adapter(self) -> nn.Module | None:
        return MixLoraMLP(self)


class MixLoraMLP(nn.Module):
    """The routed FFN, in rank space.

    With the frozen products `gate = x W_gate` and `up = x W_up` given, for each slot c

        h_c = act(gate + s dispatch_c(x A_gate) B_gate) * (up + s dispatch_c(x A_up) B_up)
        y   = (sum_c w_c h_c) W_down + s (sum_c w_c dispatch_c(h_c A_down)) B_down

    which equals evaluating whole experts and weighting their outputs, because W_down is linear and
    shared; the frozen down projection runs once a token, not once a slot. Slots come one after
    another and are added up at once (see `in_turn`): carrying a C axis makes XLA materialise
    [B, S, C, F].

    Where any number of experts may fire, slot c is expert c, and its products are with its own
    pair alone: E pairs of rank R cost what one pair of rank E R does.

    What lies between the slots' codes and their weighted hidden activations is computed again in
    the backward pass, slot by slot, so that C times [B, S, F] need not be kept for it; but where
    rematerialisation keeps it of other layers too, and slots are filled by choice. These start from
    the first one's products, `gate_c = gate_0 + s (dispatch_c - dispatch_0)(x A_gate) B_gate`: kept
    in place of the frozen products, they spare the first slot's expansion there.

    DoRA on the down projection scales each expert's output, and so needs W_down once a slot: that
    is E times where any number of experts may fire.

    A slot without an expert is the frozen FFN. The router may give it no weight, and add a share of
    the FFN's own input instead.

    Leaves: `router/kernel` [D, E], and the pairs of each targeted projection; see `ExpertPairs`.
    """

    method: MixLoraConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, ffn: FrozenFFN, context: AdapterContext, *, deterministic: bool
    ) -> tuple[jax.Array, Finish]:
        """See `AdapterMethod.mlp_adapter`."""
        method, low_rank = self.method, self.method.expert_low_rank
        routing = self._route(x, context, deterministic)
        dropout = nn.Dropout(low_rank.dropout, deterministic=deterministic)
        kernels = {
            "gate_proj": (ffn.gate.kernel, (EMBED, MLP)),
            "up_proj": (ffn.up.kernel, (EMBED, MLP)),
            "down_proj": (ffn.down_kernel, (MLP, EMBED)),
        }
        pairs = {
            target: ExpertPairs(low_rank, method.num_experts, axes, name=target)(kernel)
            for target, (kernel, axes) in kernels.items()
            if target in method.target_modules
        }
        down = pairs.pop("down_proj", None)
        # One mask of dropout for all experts of a token, and one thin product for gate and up.
        codes = joint_codes(dropout(x), {target: pair.a for target, pair in pairs.items()})
        codes = checkpoint_name(codes, CODES)

        rows, length, _ = x.shape
        axes = TokenAxes(rows, length, context.shards)
        inputs = SlotInputs(
            products={"gate_proj": ffn.gate.product, "up_proj": ffn.up.product},
            biases={"gate_proj": ffn.gate_bias, "up_proj": ffn.up_bias},
            expand={target: pair.b for target, pair in pairs.items()},
            codes=codes,
            down=None if down is None else down.a,
            dispatch=routing.dispatch,
            weights=routing.weights.astype(x.dtype),
            dropout=self._dropout_keys(routing.weights.shape[-1], deterministic),
            routed=method.router.routes_layer(context.layer_index),
        )
        # Where more than the slots' sum is needed, each slot's result is.
        summed = down is None or down.b.gains is None
        slot = Slot(ffn.activation, method.ffn_dropout, low_rank.dropout, summed)
        block = None
        if context.recomputes or routing.dispatch is None:
            width = ffn.gate.product.shape[-1]
            block = context.block_length(axes.per_shard, width, x.dtype)
        total, each = in_turn(slot, inputs.operands(axes), block)
        total, each = axes.part(total), axes.part(each, before=1)
        if down is None:
            hidden, finish = total.hidden, lambda product: product
        elif summed:
            hidden, finish = _down_once(down.b, total, each)
        else:
            hidden, finish = _down_per_slot(ffn, routing, down.b, each)
        return _around_experts(x, ffn, routing, hidden, finish)

    def _dropout_keys(self, slots: int, deterministic: bool) -> jax.Array | None:
        rates = (self.method.ffn_dropout, self.method.expert_low_rank.dropout)
        if deterministic or not any(rates):
            return None
        return jax.random.split(self.make_rng("dropout"), slots)

    def _route(self, x: jax.Array, context: AdapterContext, deterministic: bool) -> Routing:
        router = self.method.router
        module = RouterLogits(router, self.method.num_experts, EMBED, name="router")
        logits = module(x, deterministic=deterministic)
        routing = route_and_count(self, router, logits, context.token_mask, context.segment_ids)
        routed = router.routes_layer(context.layer_index)
        statistics = router_statistics(
            routing,
            context.token_mask,
            routed=routed,
            expert_groups=context.expert_groups,
            segment_ids=context.segment_ids,
        )
        sow_statistics(self, statistics)
        sow_routing(self, routing, context.token_mask, routed=routed)
        if routed is not None:
            routing = routing.where(routed)
        # As small as codes, and slow to make again.
        dispatch, weights = checkpoint_name((routing.dispatch, routing.weights), CODES)
        return routing._replace(dispatch=dispatch, weights=weights)


def _down_once(down: LoraB, total: SlotResult, each: SlotResult) -> tuple[jax.Array, Finish]:
    """The slots summed up before the down projection, and in rank space inside its pairs."""
    codes = total.codes if each.codes is None else jnp.moveaxis(each.codes, 0, -3)
    assert total.hidden is not None and codes is not None
    codes = checkpoint_name(codes.reshape(*codes.shape[:2], *down.lora_b.shape[:2]), CODES)
    expanded = down.expand(codes)
    return total.hidden, lambda product: product + expanded


def _down_per_slot(
    ffn: FrozenFFN, routing: Routing, down: LoraB, each: SlotResult
) -> tuple[jax.Array, Finish]:
    """The down projection of every slot; the first slot's goes with the rows of other adapters."""
    assert each.hidden is not None and each.codes is not None
    slots = each.hidden.shape[0]
    hidden, codes = _parts(each.hidden), _parts(checkpoint_name(each.codes, CODES))

    def adapt(product: jax.Array, slot: int) -> jax.Array:
        # Linear in product and codes, so that both may come weighted.
        if routing.dispatch is None:
            own = jax.tree.map(lambda array: array[slot], down.of_each())
            return own.adapt(product, codes[slot], None)
        return down.adapt(product, codes[slot], routing.dispatch[..., slot, :])

    def finish(product: jax.Array) -> jax.Array:
        y = adapt(product, 0)
        for slot in range(1, slots):
            more = frozen_product(hidden[slot], ffn.down_kernel)
            y = y + adapt(checkpoint_name(more, NARROW_PRODUCT), slot)
        return y

    return hidden[0], finish


def _parts(stacked: jax.Array) -> list[jax.Array]:
    """`list(stacked)`, but with one gradient, that puts the parts' together.

    That of `stacked[slot]` is as large as all slots, once for each of them.
    """
    return [part[0] for part in jax.lax.split(stacked, (1,) * stacked.shape[0])]


def _around_experts(
    x: jax.Array, ffn: FrozenFFN, routing: Routing, hidden: jax.Array, finish: Finish
) -> tuple[jax.Array, Finish]:
    """What there is besides experts: the down projection's bias, and a bypass."""
    bias = ffn.down_bias

    def finish_all(product: jax.Array) -> jax.Array:
        y = finish(product)
        if bias is not None:  # each expert has it, and it is added once after this
            weight = jnp.sum(routing.weights, axis=-1, keepdims=True)
            y = y + (weight - 1.0).astype(y.dtype) * bias.astype(y.dtype)
        if routing.bypass is not None:
            y = y + routing.bypass[..., None].astype(y.dtype) * x
        return y

    return hidden, finish_all
