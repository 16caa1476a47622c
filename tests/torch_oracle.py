"""A Llama with LoRA and MixLoRA in PyTorch, one expert after the other, as the papers write it.

Nothing of the rank-space algebra is used: every expert is evaluated whole, with its own three
adapted projections, on every token, and its output is weighted by the router. Gradients come from
PyTorch's autograd. In float64 but for transformers' own rotary tables and norms.
"""

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM


class LoraLinear(nn.Module):
    """A frozen linear layer and one low-rank pair."""

    def __init__(self, base: nn.Linear, lora_a: np.ndarray, lora_b: np.ndarray, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Parameter(torch.tensor(lora_a, dtype=torch.float64))
        self.lora_B = nn.Parameter(torch.tensor(lora_b, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.lora_A) @ self.lora_B


class MixLoraFFN(nn.Module):
    """Experts that are copies of one FFN, each with pairs of its own, behind a router."""

    def __init__(self, mlp: nn.Module, tree: dict, layer: int, top_k: int, scale: float):
        super().__init__()
        self.top_k = top_k
        self.act = mlp.act_fn
        self.router = nn.Parameter(torch.tensor(tree["router"]["kernel"][layer]).double())
        num_experts = self.router.shape[1]
        self.experts = nn.ModuleList()
        for expert in range(num_experts):
            projections = {}
            for name in ("gate_proj", "up_proj", "down_proj"):
                base = getattr(mlp, name)
                if name in tree:
                    lora_a = tree[name]["lora_A"][layer][:, expert]
                    base = LoraLinear(base, lora_a, tree[name]["lora_B"][layer][expert], scale)
                projections[name] = base
            self.experts.append(nn.ModuleDict(projections))

    def forward(self, x):
        self.logits = x @ self.router
        probs = torch.softmax(self.logits, dim=-1)
        weights, chosen = torch.topk(probs, self.top_k, dim=-1)
        self.weights = weights / weights.sum(dim=-1, keepdim=True)
        self.chosen = chosen
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            hidden = self.act(expert["gate_proj"](x)) * expert["up_proj"](x)
            share = (self.weights * (chosen == index)).sum(dim=-1, keepdim=True)
            y = y + share * expert["down_proj"](hidden)
        return y


def attach(model: LlamaForCausalLM, tree: dict, method) -> LlamaForCausalLM:
    """`model` in float64 with the adapters of `tree` (ours, keyed `layers/...`) in its layers."""
    model = model.double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = tree["layers"]
    for index, layer in enumerate(model.model.layers):
        for block in ("self_attn", "mlp"):
            for name, pair in layers.get(block, {}).items():
                if name == "moe":
                    continue
                lora_a, lora_b = (np.asarray(pair[key])[index] for key in ("lora_A", "lora_B"))
                scale = method.low_rank.scale
                adapted = LoraLinear(getattr(getattr(layer, block), name), lora_a, lora_b, scale)
                setattr(getattr(layer, block), name, adapted)
        if "moe" in layers.get("mlp", {}):
            numpy_tree = {
                name: {key: np.asarray(leaf) for key, leaf in leaves.items()}
                for name, leaves in layers["mlp"]["moe"].items()
            }
            scale = method.expert_low_rank.scale
            layer.mlp = MixLoraFFN(layer.mlp, numpy_tree, index, method.router.top_k, scale)
    return model


def completion_loss(logits, tokens: np.ndarray, loss_mask: np.ndarray) -> torch.Tensor:
    """Mean cross-entropy over the marked tokens, one at a time."""
    log_probs = torch.log_softmax(logits, dim=-1)
    losses = [
        -log_probs[row, at - 1, tokens[row, at]]
        for row in range(tokens.shape[0])
        for at in range(1, tokens.shape[1])
        if loss_mask[row, at]
    ]
    return torch.stack(losses).mean()


def gradients(model: LlamaForCausalLM, tree: dict) -> dict:
    """PyTorch's gradients, arranged like our tree."""
    result: dict = {"layers": {}}
    for block, sites in tree["layers"].items():
        for name, leaves in sites.items():
            target = result["layers"].setdefault(block, {}).setdefault(name, {})
            per_layer = [getattr(layer, block) for layer in model.model.layers]
            if name != "moe":
                for key in leaves:
                    grads = [getattr(getattr(m, name), key).grad for m in per_layer]
                    target[key] = torch.stack(grads).numpy()
                continue
            target["router"] = {"kernel": torch.stack([m.router.grad for m in per_layer]).numpy()}
            for projection in leaves.keys() - {"router"}:
                by_expert = {
                    key: torch.stack(
                        [
                            torch.stack([getattr(e[projection], key).grad for e in m.experts])
                            for m in per_layer
                        ]
                    ).numpy()
                    for key in ("lora_A", "lora_B")
                }
                # A is [L, D, E, R] with us and [L, E, D, R] here.
                by_expert["lora_A"] = by_expert["lora_A"].transpose(0, 2, 1, 3)
                target[projection] = by_expert
    return result
