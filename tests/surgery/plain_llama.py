"""A Llama with an adapter in NumPy, float64, with a plain loop over experts.

Every adapted weight is computed in full, including DoRA. Experts have unlimited capacity.
"""

import json
from typing import Any

import numpy as np
from whole_models import tensors_of

from moe_jax.checkpoints.leaves import named_leaves


class PlainLlama:
    """A base from a folder; `logits` applies an adapter to it."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        tensors = {k: v.double().numpy() for k, v in tensors_of(folder).items()}
        # Kernels as [in, out].
        self.tensors = {k: v.T if k.endswith("proj.weight") else v for k, v in tensors.items()}

    def logits(self, adapter, rows):
        """Logits [N, S, V] of rows [N, S], and the load of experts [L, E] by routed site."""
        self.adapter, self.loads = adapter, {}
        self.leaves: dict[str, Any] = {}
        if adapter is not None:
            self.leaves = {k: np.asarray(v, float) for k, v in named_leaves(adapter.tree).items()}
        return np.stack([self._row(row) for row in rows]), self.loads

    def _row(self, tokens):
        config, tensors = self.config, self.tensors
        x = tensors["model.embed_tokens.weight"][tokens]
        for layer in range(config["num_hidden_layers"]):
            self.layer = layer
            x = x + self._attention(self._norm(x, "input_layernorm"))
            x = x + self._ffn(self._norm(x, "post_attention_layernorm"))
        head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        return _scaled(x, tensors["model.norm.weight"], config["rms_norm_eps"]) @ head.T

    def _norm(self, x, name):
        weight = self.tensors[f"model.layers.{self.layer}.{name}.weight"]
        return _scaled(x, weight, self.config["rms_norm_eps"])

    def _attention(self, x):
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        split = lambda name, n: self._projection(x, "self_attn", name).reshape(len(x), n, -1)
        theta = self.config["rope_parameters"]["rope_theta"]
        q, k = (_rotated(split(n, h), theta) for n, h in (("q_proj", heads), ("k_proj", groups)))
        v = split("v_proj", groups)
        causal = np.tril(np.ones((len(x), len(x)), bool))
        outputs = []
        for head in range(heads):
            group = head * groups // heads
            scores = q[:, head] @ k[:, group].T / np.sqrt(q.shape[-1])
            outputs.append(_softmax(np.where(causal, scores, -np.inf)) @ v[:, group])
        return self._projection(np.concatenate(outputs, axis=-1), "self_attn", "o_proj")

    def _ffn(self, x):
        router = self.leaves.get("layers/mlp/moe/router/kernel")
        if router is None:
            ffn = lambda name, y: self._projection(y, "mlp", name)
            return ffn("down_proj", _silu(ffn("gate_proj", x)) * ffn("up_proj", x))
        weights = self._weights("mlp/moe", _softmax(x @ router[self.layer]))
        total = np.zeros_like(x)
        for expert in range(router.shape[-1]):
            ffn = lambda name, y, e=expert: y @ self._weight("mlp", name, "moe/", e)
            y = ffn("down_proj", _silu(ffn("gate_proj", x)) * ffn("up_proj", x))
            total += weights[:, [expert]] * y
        return total

    def _projection(self, x, block, name):
        site = f"{block}/{name}"
        router = self.leaves.get(f"layers/{site}/router/kernel")
        if router is None:
            return x @ self._weight(block, name)
        number = self.adapter.method.num_experts
        groups = number if isinstance(number, tuple) else (number,)
        experts = groups[self.layer * len(groups) // self.config["num_hidden_layers"]]
        kernel = router[self.layer][:, :experts]
        weights = self._weights(site, _softmax(x @ kernel), router.shape[-1])
        frozen = x @ self.tensors[f"model.layers.{self.layer}.{block}.{name}.weight"]
        adapted = [x @ self._weight(block, name, "", expert) for expert in range(experts)]
        return frozen + sum(weights[:, [e]] * (y - frozen) for e, y in enumerate(adapted))

    def _weight(self, block, name, moe="", expert=None):
        weight = self.tensors[f"model.layers.{self.layer}.{block}.{name}.weight"]
        site = f"layers/{block}/{moe}{name}"
        if f"{site}/lora_A" not in self.leaves:
            return weight
        a, b = (self.leaves[f"{site}/{leaf}"][self.layer] for leaf in ("lora_A", "lora_B"))
        method = self.adapter.method
        magnitude = self.leaves[f"{site}/magnitude"][self.layer] if method.dora else None
        if expert is not None:
            a, b = a[:, expert], b[expert]
            magnitude = None if magnitude is None else magnitude[expert]
        weight = weight + method.alpha / method.rank ** (0.5 if method.rslora else 1) * a @ b
        if magnitude is not None:
            weight = weight * (magnitude / np.linalg.norm(weight, axis=0))
        return weight

    def _weights(self, site, probs, width=None):
        router = self.adapter.method.router
        kind, weights = type(router).__name__, np.zeros_like(probs)
        for token, token_probs in enumerate(probs):
            order = np.argsort(-token_probs, kind="stable")
            if kind == "TopKRouter":
                chosen = order[: router.top_k]
            elif kind == "SwitchRouter":
                chosen = order[:1]
            elif kind == "TopPRouter":
                before = np.concatenate([[0.0], np.cumsum(token_probs[order])[:-1]])
                chosen = order[before <= router.top_p]
            else:
                chosen = order
            weights[token, chosen] = token_probs[chosen]
            if kind == "SwitchRouter":
                if router.weights == "straight_through":
                    weights[token, chosen] = 1.0
            elif getattr(router, "renormalise", kind == "TopKRouter"):
                weights[token] /= weights[token].sum()
        load = weights if kind == "SoftRouter" else weights > 0
        layers, experts = self.config["num_hidden_layers"], width or probs.shape[-1]
        total = self.loads.setdefault(site, np.zeros((layers, experts)))
        total[self.layer, : probs.shape[-1]] += load.sum(axis=0)
        return weights


def divergence(exact, other):
    """KL in nats per token, and the largest and the mean squared difference of logits."""
    p, q = (_log_softmax(logits) for logits in (exact, other))
    kl = (np.exp(p) * (p - q)).sum(axis=-1).mean()
    return kl, np.abs(exact - other).max(), np.square(exact - other).mean()


def _scaled(x, weight, eps):
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight


def _rotated(x, theta):
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _silu(x):
    return x / (1 + np.exp(-x))


def _log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _softmax(x):
    return np.exp(_log_softmax(x))
