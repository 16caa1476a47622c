"""LoRAMoE and MoLA in PyTorch, as the papers write them, and as MoE-PEFT computed them.

A layer is built with as many experts as it has, and not with masked ones. Every expert is applied
whole: its adapted weight is made, DoRA's column by column, and its output weighted by the router.
In float64 but for transformers' own rotary tables and norms.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny_program
import torch
import torch_oracle
import transformers
from hf_models import save_tiny_llama
from moe_peft_oracle import BASE, as_tree, load_case
from tolerances import FLOAT32_LOGITS, GRADIENT_ROUNDING, ROUNDING
from torch import nn

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.routing.losses import LoadBalance
from moe_jax.adapters.rows import AdapterRows
from moe_jax.config.model import ComputeConfig
from moe_jax.data.batch import Batch
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.loss import row_losses
from moe_jax.training.step.step import forward

Llama = transformers.LlamaForCausalLM

COEFFICIENTS = {
    "load_balance": 0.05,
    "importance_cv": 0.03,
    "router_z": 0.02,
    "router_entropy": 0.04,
    "localized_balance": 0.06,
}
LOSSES: dict = {name: {"coefficient": c} for name, c in COEFFICIENTS.items()}
LOSSES["localized_balance"] |= {"delta": -0.4, "num_groups": 2}


class AdaptedLinear(nn.Module):
    """A frozen linear layer behind one expert, or several and a router."""

    def __init__(self, base: nn.Linear, leaves: dict, experts: int, method):
        """Loads the leaves of one layer, for the first `experts` experts."""
        super().__init__()
        self.base, self.experts = base, experts
        self.scale = method.alpha / (method.rank**0.5 if method.rslora else method.rank)
        self.top_k = getattr(method.router, "top_k", None)  # None mixes all of them
        leaf = lambda array: nn.Parameter(torch.tensor(np.asarray(array)).double())
        self.router = None
        arrays = {name: array for name, array in leaves.items() if name != "router"}
        if "router" in leaves:
            self.router = leaf(leaves["router"]["kernel"][:, :experts])
            arrays["lora_A"] = arrays["lora_A"].transpose(1, 0, 2)  # [E, in, R]
        else:
            arrays = {name: array[None] for name, array in arrays.items()}
        self.lora_A, self.lora_B = (
            leaf(arrays["lora_A"][:experts]),
            leaf(arrays["lora_B"][:experts]),
        )
        self.magnitude = leaf(arrays["magnitude"][:experts]) if method.dora else None

    def forward(self, x):
        outputs = [self._expert(x, expert) for expert in range(self.experts)]
        if self.router is None:
            return outputs[0]
        self.logits = x @ self.router
        probs = torch.softmax(self.logits, dim=-1)
        if self.top_k is None:
            self.weights, self.load = probs, probs.detach()
        else:
            chosen = torch.topk(probs, self.top_k, dim=-1).indices
            self.load = torch.zeros_like(probs).scatter(-1, chosen, 1.0)
            self.weights = probs * self.load
            self.weights = self.weights / self.weights.sum(dim=-1, keepdim=True)
        return sum(self.weights[..., e, None] * outputs[e] for e in range(self.experts))

    def _expert(self, x, expert):
        weight = self.base.weight.T + self.scale * self.lora_A[expert] @ self.lora_B[expert]
        if self.magnitude is not None:
            weight = weight * (self.magnitude[expert] / weight.norm(dim=0).detach())
        y = x @ weight
        return y if self.base.bias is None else y + self.base.bias


def attach(model: Llama, tree: dict, method, counts: list[int]) -> Llama:
    """`model` in float64 with the adapter `tree` (ours, keyed `layers/...`) in its layers.

    Args:
      model: is changed.
      tree: the adapter.
      method: its configuration.
      counts: experts of every layer.
    """
    model = model.double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block, sites in tree["layers"].items():
        for name, leaves in sites.items():
            for index, layer in enumerate(model.model.layers):
                arrays = _layer(leaves, index)
                count = counts[index] if "router" in leaves else 1
                module = getattr(layer, block)
                setattr(module, name, AdaptedLinear(getattr(module, name), arrays, count, method))
    return model


def _layer(leaves, index):
    return {
        name: _layer(leaf, index) if isinstance(leaf, dict) else leaf[index]
        for name, leaf in leaves.items()
    }


def gradients(model: Llama, tree: dict) -> dict:
    """PyTorch's gradients, arranged like our tree, with zeros where a layer has no expert."""
    result: dict = {"layers": {}}
    for block, sites in tree["layers"].items():
        for name, leaves in sites.items():
            modules = [getattr(getattr(layer, block), name) for layer in model.model.layers]
            arrays = {
                key: _stack(modules, key, leaves[key].shape) for key in leaves.keys() - ROUTER
            }
            if "router" in leaves:
                shape = leaves["router"]["kernel"].shape
                arrays["router"] = {"kernel": _stack(modules, "router", shape)}
            result["layers"].setdefault(block, {})[name] = arrays
    return result


ROUTER = {"router"}


def _stack(modules, key, shape):
    stacked = np.zeros(shape)
    for layer, module in enumerate(modules):
        grad = getattr(module, key).grad.numpy()
        if module.router is None:
            stacked[layer] = grad[0]
        elif key == "lora_A":
            stacked[layer][:, : module.experts] = grad.transpose(1, 0, 2)
        elif key == "router":
            stacked[layer][:, : module.experts] = grad
        else:
            stacked[layer][: module.experts] = grad
    return stacked


def routed(model: Llama) -> dict[str, list[AdaptedLinear]]:
    """The projections with a router, of every layer, by name; after a forward pass."""
    sites: dict[str, list[AdaptedLinear]] = {}
    for layer in model.model.layers:
        for name, module in layer.named_modules():
            if isinstance(module, AdaptedLinear) and module.router is not None:
                sites.setdefault(name, []).append(module)
    return sites


def router_losses(model: Llama, batch, delta: float, num_groups: int) -> dict:
    """Every auxiliary loss, of real tokens only, averaged over the layers and then the sites.

    Args:
      model: after a forward pass on `batch`.
      batch: rows of one sequence each.
      delta, num_groups: parameters of the localized balance.
    """
    real = torch.tensor(batch.segment_ids.astype(bool))
    modules = [module for site in routed(model).values() for module in site]
    losses: dict = {}
    for module in modules:
        experts = module.experts
        probs = torch.softmax(module.logits, dim=-1)[real]
        importance = module.weights[real].sum(dim=0)
        z = []
        for row, group in enumerate(batch.expert_groups.max(axis=1)):
            shares = module.weights[row][real[row]].mean(dim=0)
            in_group = [expert * num_groups // experts == group for expert in range(experts)]
            z.append(shares * torch.tensor([1 + delta if own else 1 - delta for own in in_group]))
        z = torch.stack(z)
        found = {
            "load_balance": experts * (module.load[real].mean(dim=0) * probs.mean(dim=0)).sum(),
            "importance_cv": importance.var(correction=0) / importance.mean() ** 2,
            "router_z": (torch.logsumexp(module.logits[real], dim=-1) ** 2).mean(),
            "router_entropy": -(probs * probs.log()).sum(dim=-1).mean(),
            "localized_balance": z.var(correction=0) / z.mean() ** 2,
        }
        for name, value in found.items():
            losses[name] = losses.get(name, 0.0) + value / len(modules)
    return losses


def assert_training_step_equals(folder: Path, method: dict, counts: list[int]) -> None:
    """One step of ours, with all losses on: logits' loss, router losses and every gradient.

    Args:
      folder: for the base.
      method: the configuration, without its losses.
      counts: experts of every layer.
    """
    reference = save_tiny_llama(folder, attention_bias=True)
    config = read_model_config(folder)
    program = tiny_program.program({"a": {**method, "losses": LOSSES}}, config=config)
    params = load_base_params(folder, config, "float32")
    adapters = tiny_program.random_adapters(program)
    state = program.init_state(params).replace(adapters=adapters)
    tree = jax.tree.map(np.asarray, adapters["a"])
    batch = tiny_program.random_batch(8)

    oracle = attach(reference, tree, program.adapter_rows[0].method, counts)
    tokens, mask = torch.tensor(batch.tokens), torch.tensor(batch.segment_ids)
    logits = oracle(tokens, attention_mask=mask).logits
    expected = router_losses(oracle, batch, delta=-0.4, num_groups=2)
    expected["loss"] = torch_oracle.completion_loss(logits, batch.tokens, batch.loss_mask)
    total = expected["loss"] + sum(c * expected[name] for name, c in COEFFICIENTS.items())
    total.backward()

    state, metrics = program.train_step(state, params, program.put_train_batch(batch))
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"a/{name}"], value.item(), rtol=1e-5, err_msg=name)
    # Plain SGD with learning rate 1: what a leaf lost is its gradient.
    lost = jax.tree.map(lambda old, new: old - np.asarray(new), tree, state.adapters["a"])
    _assert_gradients(lost, gradients(oracle, tree))
    for name, value in metrics.items():
        if name == "a/expert_load":  # of experts that are not there it is NaN
            value = np.nan_to_num(value, nan=0.0)
        assert np.isfinite(value).all(), name


def assert_equals_recorded_figures(name: str, method: AdapterMethod, coefficient: float) -> None:
    """Logits, losses and every gradient of a case recorded from MoE-PEFT; see `moe_peft_oracle`.

    Args:
      name: name of the case.
      method: the same in our configuration, without losses.
      coefficient: coefficient of the case's balance loss, which pools all sites of all layers.
    """
    case = load_case(name)
    config = read_model_config(BASE)
    params = load_base_params(BASE, config, "float32")
    compute, balance = ComputeConfig(dtype="float32"), LoadBalance(coefficient=coefficient)
    model = LlamaForCausalLM(config, compute, (AdapterRows("a", method, 0, 4),))

    def total(adapter, params, batch):
        logits, statistics = forward(model, params, {"a": adapter}, batch, tiny_program.logits_head)
        losses, counts = row_losses(logits, batch)
        loss = jnp.sum(losses) / jnp.sum(counts)
        sites = statistics["a"].values()
        pooled = jax.tree.map(lambda *layers: jnp.concatenate(layers), *sites).pooled()
        aux_loss = coefficient * balance.layer_loss(pooled)
        return loss + aux_loss, (logits, loss, aux_loss)

    run = jax.jit(jax.grad(total, has_aux=True))
    adapter = jax.tree.map(jnp.asarray, as_tree(case.weights))
    for part in ("full", "right"):
        real = case[f"{part}/mask"].astype(bool)
        ones = real.astype(np.int32)
        positions = np.where(real, np.arange(real.shape[1]), 0).astype(np.int32)
        zeros = np.zeros_like(ones)
        batch = Batch(case[f"{part}/tokens"], real, ones, positions, *[zeros] * 3)
        gradient, (logits, loss, aux_loss) = run(adapter, params, batch)
        expected = case[f"{part}/logits"]
        np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=FLOAT32_LOGITS)
        np.testing.assert_allclose(loss, case[f"{part}/masked_loss"], **ROUNDING)
        recorded = case[f"{part}/aux_loss"] if coefficient else 0.0
        np.testing.assert_allclose(aux_loss, recorded, **ROUNDING)
        if part == "full":
            _assert_gradients(gradient, as_tree(case.group("full/grad")))


def _assert_gradients(ours: dict, theirs: dict) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree_util.tree_map_with_path(
        lambda path, our, their: np.testing.assert_allclose(
            our, their, **GRADIENT_ROUNDING, err_msg=jax.tree_util.keystr(path)
        ),
        ours,
        theirs,
    )
