"""MixLoRA's FFN against the sparse blocks of transformers: Mixtral's and Switch Transformer's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapted_ffn import AdaptedFFN, llama_mlp, mixlora, random_input
from tolerances import FLOAT32_LOGITS, GRADIENT_ROUNDING
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

EXPERTS, ROWS, LENGTH = 4, 3, 12


def _whole_weights(mlp, tree, name, scale):
    """The experts' own weights of one projection, [E, out, in]."""
    lora_a, lora_b = (np.asarray(tree[name][leaf], np.float64) for leaf in ("lora_A", "lora_B"))
    delta = scale * np.einsum("der,erf->efd", lora_a, lora_b)
    return getattr(mlp, name).weight + torch.tensor(delta)


def _compare(ours, tree, block):
    """Outputs, and the gradients of the input and of the router."""
    x = random_input(ROWS, LENGTH)
    cotangent = 0.1 * np.random.default_rng(4).standard_normal(x.shape).astype(np.float32)

    @jax.jit
    def step(tree, x):
        y, pullback = jax.vjp(lambda tree, x: ours(tree, x)[0], tree, x)
        return y, pullback(cotangent)

    y, (gradients, x_gradient) = step(tree, x)
    their_x = torch.tensor(np.asarray(x)).double().requires_grad_()
    their_y = block(their_x)
    their_y.backward(torch.tensor(cotangent).double())
    kernel = next(p for name, p in block.named_parameters() if p.shape == (EXPERTS, ours.width))
    np.testing.assert_allclose(y, their_y.detach(), rtol=0, atol=FLOAT32_LOGITS)
    np.testing.assert_allclose(x_gradient, their_x.grad, **GRADIENT_ROUNDING)
    np.testing.assert_allclose(gradients["router"]["kernel"], kernel.grad.T, **GRADIENT_ROUNDING)
    assert np.abs(gradients["router"]["kernel"]).max() > 1e-2
    return x, y


def test_top_k_is_mixtrals_block():
    method, mlp = mixlora({"name": "top_k", "top_k": 2}), llama_mlp()
    ours = AdaptedFFN(mlp, method, ROWS)
    tree = ours.random_tree()
    config = MixtralConfig(
        hidden_size=ours.width,
        intermediate_size=ours.config.intermediate_size,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        hidden_act="silu",
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).double()
    gate, up, down = (
        _whole_weights(mlp, tree, name, method.scale)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    with torch.no_grad():
        block.gate.weight.copy_(torch.tensor(np.asarray(tree["router"]["kernel"]).T))
        block.experts.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
        block.experts.down_proj.copy_(down)
    _compare(ours, tree, block)


@pytest.fixture
def switch():
    """Ours with an FFN that is not gated, as Switch Transformer's: its up projection gives ones."""
    mlp = llama_mlp(bias=True)
    with torch.no_grad():
        mlp.gate_proj.bias.zero_()
        mlp.up_proj.weight.zero_()
        mlp.up_proj.bias.fill_(1.0)
        mlp.down_proj.bias.zero_()
    router = {"name": "switch", "capacity": 2}
    method = mixlora(router, target_modules=("gate_proj", "down_proj"))
    ours = AdaptedFFN(mlp, method, ROWS, hidden_act="relu")
    tree = ours.random_tree()
    config = SwitchTransformersConfig(
        d_model=ours.width,
        d_ff=ours.config.intermediate_size,
        num_experts=EXPERTS,
        expert_capacity=2,
        dense_act_fn="relu",
    )
    block = SwitchTransformersSparseMLP(config).double().eval()
    gate, down = (
        _whole_weights(mlp, tree, name, method.scale) for name in ("gate_proj", "down_proj")
    )
    with torch.no_grad():
        block.router.classifier.weight.copy_(torch.tensor(np.asarray(tree["router"]["kernel"]).T))
        for index, expert in enumerate(block.experts.values()):
            expert.wi.weight.copy_(gate[index])
            expert.wo.weight.copy_(down[index])
    return ours, tree, block


def test_switch_is_the_block_of_switch_transformer(switch):
    ours, tree, block = switch
    _, y = _compare(ours, tree, block)
    dropped = np.all(np.asarray(y) == 0.0, axis=-1)
    assert 0 < dropped.sum() < dropped.size


def test_switch_routes_as_the_router_of_switch_transformer(switch):
    ours, _, block = switch
    x = random_input(ROWS, LENGTH)
    dispatch, weights, logits = block.router(torch.tensor(np.asarray(x)).double())
    router = ours.method.router
    routing = router.route(
        jnp.asarray(logits.detach().numpy(), jnp.float32), jnp.ones((ROWS, LENGTH), bool)
    )
    np.testing.assert_array_equal(routing.dispatch[:, :, 0], dispatch)
    np.testing.assert_array_equal(routing.overflow, 1 - dispatch.sum(dim=-1))
    served = dispatch.sum(dim=-1, keepdim=True)
    expected = (weights * served).detach()
    np.testing.assert_allclose(routing.weights, expected, rtol=1e-5)
