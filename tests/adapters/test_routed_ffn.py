"""Every router with its options, one FFN, against whole experts in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_moe_oracle
from adapted_ffn import AdaptedFFN, llama_mlp, mixlora, random_input
from tolerances import FLOAT32_LOGITS, GRADIENT_ROUNDING, ROUNDING

from moe_jax.adapters.routing.losses import ROUTER_LOSSES

COEFFICIENTS = {"load_balance": 0.5, "importance_cv": 0.3, "router_z": 0.2, "router_entropy": 0.7}
ROWS, LENGTH = 3, 10
# Padding on the left, in the middle and on the right.
MASK = np.ones((ROWS, LENGTH), bool)
MASK[0, :3], MASK[1, 4:6], MASK[2, 7:] = False, False, False

TOP_P, SWITCH = {"name": "top_p", "top_p": 0.6}, {"name": "switch"}
CASES = {
    "top_k of three": ({"name": "top_k", "top_k": 3}, {}, True),
    "top_k, DoRA, bias": ({"name": "top_k"}, {"dora": True}, True),
    "top_p": (TOP_P, {}, False),
    "top_p as MoE-PEFT, bias": ({**TOP_P, "renormalise": False, "temperature": 1.5}, {}, True),
    "top_p, DoRA, bias": ({**TOP_P, "renormalise": False}, {"dora": True}, True),
    "top_p, DoRA but not down": (TOP_P, {"dora": True, "target_modules": ("gate_proj",)}, True),
    "soft, bias": ({"name": "soft"}, {"expert_lora": {"rank": 2, "alpha": 5.0}}, True),
    "soft, down alone": ({"name": "soft"}, {"target_modules": ("down_proj",)}, False),
    "switch, bias": ({**SWITCH, "capacity": 2}, {}, True),
    "switch as MoE-PEFT, bias": ({**SWITCH, "capacity_factor": 0.8, "overflow": "input"}, {}, True),
    "switch, frozen overflow, DoRA, bias": (
        {**SWITCH, "capacity": 2, "overflow": "frozen", "weights": "straight_through"},
        {"dora": True},
        True,
    ),
    "switch, straight-through input": (
        {**SWITCH, "capacity": 1, "overflow": "input", "weights": "straight_through"},
        {"target_modules": ("up_proj", "down_proj")},
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_losses_and_all_gradients_equal_whole_experts(case):
    router, overrides, bias = CASES[case]
    method = mixlora(router, **overrides)
    mlp = llama_mlp(bias)
    ours = AdaptedFFN(mlp, method, ROWS)
    tree, x = ours.random_tree(), random_input(ROWS, LENGTH)
    cotangent = 0.1 * np.random.default_rng(4).standard_normal(x.shape).astype(np.float32)
    losses = {name: ROUTER_LOSSES[name](coefficient=c) for name, c in COEFFICIENTS.items()}

    @jax.jit
    def step(tree, x):
        def objective(tree, x):
            y, statistics = ours(tree, x, MASK)
            values = {name: loss.layer_loss(statistics) for name, loss in losses.items()}
            total = jnp.sum(y * cotangent)
            total += sum(loss.coefficient * values[name] for name, loss in losses.items())
            return total, (y, values, statistics)

        return jax.grad(objective, argnums=(0, 1), has_aux=True)(tree, x)

    (gradients, x_gradient), (y, values, statistics) = step(tree, x)

    oracle = torch_moe_oracle.RoutedFFN(mlp, tree, router, method.expert_low_rank.scale)
    oracle.mask = MASK
    their_x = torch.tensor(np.asarray(x)).double().requires_grad_()
    their_y = oracle(their_x)
    their_values = torch_moe_oracle.router_losses([oracle.decision], MASK)
    total = (their_y * torch.tensor(cotangent)).sum()
    (total + sum(c * their_values[name] for name, c in COEFFICIENTS.items())).backward()

    np.testing.assert_allclose(y, their_y.detach(), rtol=0, atol=FLOAT32_LOGITS)
    for name, value in their_values.items():
        np.testing.assert_allclose(values[name], value.item(), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(x_gradient, their_x.grad, **GRADIENT_ROUNDING)
    theirs = oracle.gradients()
    assert jax.tree.structure(gradients) == jax.tree.structure(theirs)
    for (path, own), their in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(theirs), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert np.abs(own).max() > 1e-3, name
        np.testing.assert_allclose(own, their, **GRADIENT_ROUNDING, err_msg=name)

    # What makes the case one: other than the frozen FFN, tokens of different fates.
    frozen = mlp(torch.tensor(np.asarray(x)).double())
    assert (their_y - frozen).abs().mean() > 1e-2
    decision, real = oracle.decision, torch.tensor(MASK)
    if router["name"] == "switch":
        assert 0 < decision.overflow[real].sum() < real.sum()
        np.testing.assert_array_equal(statistics.overflow_sum, decision.overflow[real].sum())
    else:
        assert statistics.overflow_sum is None
    if router["name"] == "top_p":
        assert len(set(decision.load[real].sum(dim=-1).tolist())) > 1


def _fresh_b(tree):
    """An untrained adapter's leaves: B is zero, the router is whatever it is."""
    return {
        name: {key: leaf * 0 if key == "lora_B" else leaf for key, leaf in leaves.items()}
        for name, leaves in tree.items()
    }


@pytest.mark.parametrize(
    ("router", "intact"),
    [
        (TOP_P, True),
        ({**TOP_P, "renormalise": False}, False),
        ({"name": "soft"}, True),
        ({**SWITCH, "capacity": 2, "overflow": "frozen", "weights": "straight_through"}, True),
        ({**SWITCH, "capacity": 2, "overflow": "frozen"}, False),
        ({**SWITCH, "capacity": 2, "weights": "straight_through"}, False),
    ],
)
def test_which_untrained_adapters_leave_the_base_as_it_is(router, intact):
    mlp = llama_mlp(bias=True)
    ours = AdaptedFFN(mlp, mixlora(router), ROWS)
    x = random_input(ROWS, LENGTH)
    y, _ = jax.jit(ours)(_fresh_b(ours.random_tree()), x)
    frozen = mlp(torch.tensor(np.asarray(x)).double())
    if intact:
        np.testing.assert_allclose(y, frozen, **ROUNDING)
    else:
        assert np.abs(y - frozen.numpy()).max() > 0.1


@pytest.fixture
def transparent():
    """An FFN whose down projection is the identity, and the adapters' leaves on gate and up."""
    mlp = llama_mlp()
    mlp.down_proj = torch.nn.Linear(80, 80, bias=False)
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(80, 80, bias=False))
    with torch.no_grad():
        mlp.down_proj.weight.copy_(torch.eye(80))
    return mlp


def _dropping(mlp, router, **overrides):
    targets = ("gate_proj", "up_proj")
    method = mixlora(router, num_experts=2, target_modules=targets, **overrides)
    return AdaptedFFN(mlp, method, ROWS)


@pytest.mark.parametrize("router", [{"name": "top_k"}, {"name": "soft"}])
def test_ffn_dropout_drops_each_experts_hidden_activation(transparent, router):
    # Both experts have all of a tie's weights, one half each. A mask keeps an entry of an expert
    # with probability 0.5, at twice its value: so there are h_0 + h_1, h_0, h_1 and 0.
    ours = _dropping(transparent, router, ffn_dropout=0.5)
    tree = ours.random_tree()
    tree["router"]["kernel"] = 0.0 * tree["router"]["kernel"]
    x = random_input(ROWS, LENGTH, ours.width)
    one = jax.jit(_dropping(transparent, {"name": "top_k", "top_k": 1}))
    flipped = {
        name: {key: jnp.flip(leaf, 1 if key == "lora_A" else 0) for key, leaf in leaves.items()}
        for name, leaves in tree.items()
    }
    first, second = (np.asarray(one(leaves, x)[0]) for leaves in (tree, flipped))
    outcomes = np.stack([first + second, first, second, 0.0 * first])

    calm, _ = jax.jit(ours)(tree, x)
    np.testing.assert_allclose(calm, (first + second) / 2, **ROUNDING)
    noisy, _ = jax.jit(ours)(tree, x, dropout_key=jax.random.key(0))
    distances = np.abs(outcomes - np.asarray(noisy))
    np.testing.assert_allclose(distances.min(axis=0), 0.0, atol=1e-6)
    counts = np.bincount(distances.argmin(axis=0).ravel(), minlength=4)
    np.testing.assert_allclose(counts / counts.sum(), 0.25, atol=0.03)
