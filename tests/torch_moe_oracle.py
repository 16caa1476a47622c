"""Routed FFNs in PyTorch, in float64: one token after the other, every expert whole.

Nothing of the rank-space algebra is used. Each expert's three weights `W + s A B` are materialized,
with DoRA normalized and scaled, every expert is evaluated on every token, and the router decides
token by token in plain Python. Gradients come from PyTorch's autograd.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass
class Decision:
    """Routing of all tokens, float64.

    Attributes:
      logits, probs: [B, S, E], as the losses see them.
      shares: [B, S, E], each expert's share of the output.
      frozen, bypass: [B, S], the shares of the FFN without an expert, and of its input.
      load: [B, S, E].
      overflow: [B, S].
    """

    logits: torch.Tensor
    probs: torch.Tensor
    shares: torch.Tensor
    frozen: torch.Tensor
    bypass: torch.Tensor
    load: torch.Tensor
    overflow: torch.Tensor


def decide(router: dict, logits: torch.Tensor, mask: np.ndarray) -> Decision:
    """The decision of the router that the configuration `router` describes.

    Args:
      router: as in a run's configuration.
      logits: [B, S, E].
      mask: bool [B, S], false at padding.
    """
    settings = {key: value for key, value in router.items() if key not in ("name", "sparse_step")}
    logits = logits / settings.pop("temperature", 1.0)
    rows, length, experts = logits.shape
    probs = torch.softmax(logits, dim=-1)
    zero = torch.zeros((), dtype=probs.dtype)
    shares = [[[zero] * experts for _ in range(length)] for _ in range(rows)]
    frozen, bypass = ([[zero] * length for _ in range(rows)] for _ in range(2))
    load, overflow = torch.zeros_like(probs), torch.zeros_like(probs[..., 0])
    for b in range(rows):
        served = Counter()
        for s in range(length):
            ranked = sorted(range(experts), key=lambda e: (-probs[b, s, e].item(), e))
            if router["name"] == "switch":
                expert = ranked[0]
                load[b, s, expert] = 1.0
                served[expert] += bool(mask[b, s])
                fits = served[expert] <= _capacity(settings, int(mask[b].sum()), experts)
                weight = probs[b, s, expert]
                if settings.get("weights") == "straight_through":
                    weight = weight / weight.detach()
                how = settings.get("overflow", "residual")
                overflow[b, s] = not fits
                if fits:
                    shares[b][s][expert] = weight
                elif how == "input":
                    bypass[b][s] = weight
                elif how == "frozen":
                    frozen[b][s] = zero + 1.0
                continue
            kept = _kept(router["name"], settings, [probs[b, s, e].item() for e in ranked])
            chosen = ranked[:kept]
            total = sum(probs[b, s, e] for e in chosen)
            for expert in chosen:
                weight = probs[b, s, expert]
                shares[b][s][expert] = (
                    weight / total if settings.get("renormalise", True) else weight
                )
                load[b, s, expert] = weight.detach() if router["name"] == "soft" else 1.0
    stack = lambda table: torch.stack([torch.stack(row) for row in table])
    shares = torch.stack([stack(row) for row in shares])
    return Decision(logits, probs, shares, stack(frozen), stack(bypass), load, overflow)


def _capacity(settings: dict, tokens: int, experts: int) -> int:
    if settings.get("capacity") is not None:
        return settings["capacity"]
    return math.ceil(round(settings["capacity_factor"] * tokens / experts, 9))


def _kept(name: str, settings: dict, ranked: list[float]) -> int:
    """Number of experts of a token, given its probabilities in descending order."""
    if name == "top_k":
        return settings.get("top_k", 2)
    if name == "soft":
        return len(ranked)
    collected = 0.0
    for count, prob in enumerate(ranked, 1):
        collected += prob
        if collected > settings["top_p"]:
            return count
    return len(ranked)


class RoutedFFN(nn.Module):
    """Experts on a frozen gated FFN.

    Attributes:
      mask: bool [B, S], to be set before a call.
      decision: the latest one.
    """

    def __init__(self, mlp: nn.Module, tree: dict, router: dict, scale: float):
        """Takes over a frozen FFN.

        Args:
          mlp: with `gate_proj`, `up_proj` and `down_proj`, and an activation `act_fn`.
          tree: our leaves of one layer, `{"router": {"kernel"}, "up_proj": {"lora_A", ...}, ...}`.
          router: as in a run's configuration.
          scale: factor of a pair's product.
        """
        super().__init__()
        self.mlp, self.router, self.scale = mlp.double().requires_grad_(False), router, scale
        self.leaves = nn.ModuleDict(
            {
                name: nn.ParameterDict(
                    {
                        key: nn.Parameter(torch.tensor(np.asarray(leaf)).double())
                        for key, leaf in own.items()
                    }
                )
                for name, own in tree.items()
            }
        )
        self.num_experts = self.leaves["router"]["kernel"].shape[1]

    def forward(self, x):
        decision = decide(self.router, x @ self.leaves["router"]["kernel"], self.mask)
        self.decision = decision
        y = decision.frozen[..., None] * self.mlp(x) + decision.bypass[..., None] * x
        for expert in range(self.num_experts):
            y = y + decision.shares[..., expert, None] * self._expert(expert, x)
        return y

    def _expert(self, expert: int, x):
        gate, up, down = (self._projection(name, expert) for name in PROJECTIONS)
        return down(self.mlp.act_fn(gate(x)) * up(x))

    def _projection(self, name: str, expert: int):
        base = getattr(self.mlp, name)
        weight = base.weight.T
        if name in self.leaves:
            own = self.leaves[name]
            weight = weight + self.scale * own["lora_A"][:, expert] @ own["lora_B"][expert]
            if "magnitude" in own:
                weight = weight * own["magnitude"][expert] / weight.norm(dim=0).detach()
        return lambda x: x @ weight if base.bias is None else x @ weight + base.bias

    def gradients(self) -> dict:
        """The gradients of all leaves, arranged like our tree."""
        return {
            name: {
                key: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
                for key, leaf in own.items()
            }
            for name, own in self.leaves.items()
        }


def router_losses(decisions: list[Decision], mask: np.ndarray) -> dict[str, torch.Tensor]:
    """Every loss of one router each, averaged over the layers that `decisions` are of."""
    totals = Counter()
    for decision in decisions:
        real = torch.tensor(mask)
        logits, probs = decision.logits[real], decision.probs[real]
        importance = decision.shares[real].sum(dim=0)
        experts = probs.shape[-1]
        totals["load_balance"] += experts * (decision.load[real].mean(0) * probs.mean(0)).sum()
        totals["importance_cv"] += importance.var(correction=0) / importance.mean() ** 2
        totals["router_z"] += torch.logsumexp(logits, dim=-1).square().mean()
        totals["router_entropy"] += torch.distributions.Categorical(logits=logits).entropy().mean()
    return {name: total / len(decisions) for name, total in totals.items()}
