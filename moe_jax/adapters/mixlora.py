"""MixLoRA: an FFN whose experts are LoRA deltas on one frozen FFN (arXiv:2404.15159)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.adapters.aux_losses import check_router_losses
from moe_jax.adapters.dispatch import expand_codes, expert_codes, select_codes
from moe_jax.adapters.lora import Lora, adapter_leaf, lora_a_init
from moe_jax.adapters.method import (
    ATTENTION_MODULES,
    MLP_MODULES,
    AdapterMethod,
    RouterLossConfig,
)
from moe_jax.adapters.routers import Router, top_k_routing
from moe_jax.adapters.statistics import router_statistics, sow_statistics
from moe_jax.config.parse import require
from moe_jax.sharding.axes import EMBED, EXPERTS, MLP, RANK


@dataclass(frozen=True, kw_only=True)
class ExpertLoraConfig:
    """What differs for the experts from the LoRA on attention; None keeps the common value."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None

    def __post_init__(self):
        require(self.rank is None or self.rank > 0, "rank", "must be positive")
        require(self.alpha is None or self.alpha > 0, "alpha", "must be positive")
        require(self.dropout is None or 0.0 <= self.dropout < 1.0, "dropout", "must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class MixLoraConfig(AdapterMethod):
    """MixLoRA: LoRA on the targeted attention projections, experts on the targeted FFN ones.

    Attributes:
      num_experts: E.
      top_k: experts per token.
      router_init_std: standard deviation of the router's initial kernel.
      jitter_noise: see `Router`.
      expert_lora: the experts' own rank, alpha and dropout.
      losses: the router's auxiliary losses by name, for example `load_balance`.
    """

    num_experts: int
    top_k: int
    router_init_std: float = 0.02
    jitter_noise: float = 0.0
    expert_lora: ExpertLoraConfig = ExpertLoraConfig()
    losses: dict[str, RouterLossConfig] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        require(
            any(target in MLP_MODULES for target in self.target_modules),
            "target_modules",
            f"MixLoRA needs at least one of {', '.join(MLP_MODULES)}; without experts use 'lora'",
        )
        require(self.num_experts > 1, "num_experts", "must be at least 2; for one use 'lora'")
        require(
            1 <= self.top_k <= self.num_experts,
            "top_k",
            f"must lie between 1 and num_experts ({self.num_experts})",
        )
        require(self.router_init_std > 0, "router_init_std", "must be positive")
        require(0.0 <= self.jitter_noise < 1.0, "jitter_noise", "must lie in [0, 1)")
        check_router_losses(self.losses)

    @property
    def routes(self) -> bool:
        return True

    @property
    def router_losses(self) -> dict[str, RouterLossConfig]:
        return self.losses

    @property
    def expert_rank(self) -> int:
        """R of the experts."""
        return self.expert_lora.rank or self.rank

    @property
    def expert_scale(self) -> float:
        """Alpha / R of the experts."""
        return (self.expert_lora.alpha or self.alpha) / self.expert_rank

    @property
    def expert_dropout(self) -> float:
        """Dropout of the experts' inputs."""
        own = self.expert_lora.dropout
        return self.dropout if own is None else own

    def projection_adapter(self, target: str, axes: tuple[str, str]) -> nn.Module | None:
        adapted = target in self.target_modules and target in ATTENTION_MODULES
        return Lora(self, axes) if adapted else None

    def mlp_adapter(self) -> nn.Module | None:
        return MixLoraMLP(self)


class ExpertPair(nn.Module):
    """The low-rank pairs of all experts of one projection.

    Leaves: `lora_A` [in, E, R], `lora_B` [E, R, out].
    """

    method: MixLoraConfig
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, in_features: int, out_features: int) -> tuple[jax.Array, jax.Array]:
        experts, rank = self.method.num_experts, self.method.expert_rank
        init_a = lora_a_init(self.method.init, in_features, rank)
        zeros = nn.initializers.zeros
        axes_a, axes_b = (self.axes[0], EXPERTS, RANK), (EXPERTS, RANK, self.axes[1])
        lora_a = adapter_leaf(self, "lora_A", init_a, (in_features, experts, rank), axes_a)
        lora_b = adapter_leaf(self, "lora_B", zeros, (experts, rank, out_features), axes_b)
        return lora_a, lora_b


class MixLoraMLP(nn.Module):
    """The routed FFN, in rank space.

    With the frozen products `gate = x W_gate` and `up = x W_up` given, for each slot c

        h_c = act(gate + s dispatch_c(x A_gate) B_gate) * (up + s dispatch_c(x A_up) B_up)
        y   = (sum_c w_c h_c) W_down + s (sum_c w_c dispatch_c(h_c A_down)) B_down

    which equals evaluating whole experts and weighting their outputs, because W_down is linear and
    shared; the frozen down projection runs once a token, not once a slot. The slots (one or two as
    a rule) are unrolled: carrying a C axis makes XLA materialise [B, S, C, F].
    """

    method: MixLoraConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        gate: jax.Array,
        up: jax.Array,
        activation: Callable[[jax.Array], jax.Array],
        token_mask: jax.Array,
        *,
        deterministic: bool,
    ) -> tuple[jax.Array, jax.Array | None]:
        """See `AdapterMethod.mlp_adapter`."""
        method, width, ffn_width = self.method, x.shape[-1], gate.shape[-1]
        router = Router(
            method.num_experts, method.router_init_std, method.jitter_noise, name="router"
        )
        routing = top_k_routing(router(x, deterministic=deterministic), method.top_k)
        sow_statistics(self, router_statistics(routing, token_mask))
        dispatch, weights = routing.dispatch.astype(x.dtype), routing.weights.astype(x.dtype)
        dropout = nn.Dropout(method.expert_dropout, deterministic=deterministic)

        # One mask of dropout for all experts of a token, and one thin product for gate and up.
        pairs = {
            target: ExpertPair(method, (EMBED, MLP), name=target)(width, ffn_width)
            for target in ("gate_proj", "up_proj")
            if target in method.target_modules
        }
        codes = dict[str, jax.Array]()
        if pairs:
            stacked = jnp.concatenate([lora_a for lora_a, _ in pairs.values()], axis=-1)
            both = expert_codes(dropout(x), stacked) * method.expert_scale
            codes = dict(zip(pairs, jnp.split(both, len(pairs), axis=-1), strict=True))

        def adapted(frozen: jax.Array, target: str, slot: int) -> jax.Array:
            if target not in pairs:
                return frozen
            chosen = select_codes(codes[target], dispatch[..., slot, :])
            return frozen + expand_codes(chosen, pairs[target][1])

        down_pair = None
        if "down_proj" in method.target_modules:
            down_pair = ExpertPair(method, (MLP, EMBED), name="down_proj")(ffn_width, width)
        hidden = jnp.zeros_like(gate)
        down_codes = None
        for slot in range(method.top_k):
            weight = weights[..., slot, None]
            slot_hidden = activation(adapted(gate, "gate_proj", slot))
            slot_hidden = slot_hidden * adapted(up, "up_proj", slot)
            hidden = hidden + weight * slot_hidden
            if down_pair is not None:
                slot_codes = expert_codes(dropout(slot_hidden), down_pair[0])
                chosen = select_codes(slot_codes, weight * dispatch[..., slot, :])
                down_codes = chosen if down_codes is None else down_codes + chosen
        if down_pair is None or down_codes is None:
            return hidden, None
        return hidden, expand_codes(down_codes * method.expert_scale, down_pair[1])
