"""LoRA+ equals the optimizer of peft, and changes no other learning rate."""

import jax
import numpy as np
import optax
import peft
import peft.optimizers
import pytest
import torch
from tolerances import ROUNDING

from moe_jax.config.optimizer import OptimizerConfig, ScheduleConfig
from moe_jax.errors import ConfigError
from moe_jax.training.step.optimizer import build_optimizer

CONSTANT = ScheduleConfig(kind="constant")
BASE = {"kernel": np.zeros((2, 3), np.float32)}


def _steps(config, adapter, gradients):
    """Yields the adapter after each step on the given gradients."""
    optimizer = build_optimizer({"x": config}, 10)
    state = optimizer.init({"params": BASE, "adapters": {"x": adapter}})
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        given = {"params": BASE, "adapters": {"x": gradient}}
        updates, state = update(given, state, {"params": BASE, "adapters": {"x": adapter}})
        adapter = optax.apply_updates(adapter, updates["adapters"]["x"])
        yield adapter


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_equals_the_optimizer_of_peft(decay):
    torch.manual_seed(0)
    network = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6), "down": torch.nn.Linear(6, 4)})
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    theirs = peft.get_peft_model(network, config)
    leaves = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(leaves) == 4
    optimizer = peft.optimizers.create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=1e-2,
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=decay,
        betas=(0.8, 0.95),
        eps=1e-6,
    )

    def tree(of):
        """`of` each parameter as a tree; names in peft end in `up.lora_A.default.weight`."""
        keys = {name: name.split(".")[-4:-2] for name in leaves}
        result = {"up": {}, "down": {}}
        for name, (site, leaf) in keys.items():
            result[site][leaf] = of(leaves[name]).numpy().copy()
        return result

    config = OptimizerConfig(
        learning_rate=1e-2,
        lora_plus_ratio=16.0,
        weight_decay=decay,
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        clip_norm=None,
        schedule=CONSTANT,
    )
    gradients = []
    for step in range(5):
        for leaf in leaves.values():
            leaf.grad = torch.randn(leaf.shape) * 1.5**-step
        gradients.append(tree(lambda leaf: leaf.grad))
    steps = _steps(config, tree(torch.Tensor.detach), gradients)
    for gradient, ours in zip(gradients, steps, strict=True):
        for name, leaf in leaves.items():
            site, key = name.split(".")[-4:-2]
            leaf.grad = torch.tensor(gradient[site][key])
        optimizer.step()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING),
            ours,
            tree(torch.Tensor.detach),
        )


def _adapter(value):
    leaf = np.full((2, 2), value, np.float32)
    pair = {"lora_A": leaf, "lora_B": leaf, "magnitude": leaf}
    return {"moe": {"up_proj": pair, "router": {"kernel": leaf}}}


def test_by_hand():
    # Four leaves of four elements 1, gradients of 0.5: their norm is 2, cut to 1, so 0.25 each. A:
    # 1 - 0.1 (0.25 + 0.5 * 1); B: four times that step; the others without decay.
    config = OptimizerConfig(
        name="sgd",
        learning_rate=0.1,
        lora_plus_ratio=4.0,
        weight_decay=0.5,
        clip_norm=1.0,
        schedule=CONSTANT,
    )
    (moved,) = _steps(config, _adapter(1.0), [_adapter(0.5)])
    expected = {"lora_A": 0.925, "lora_B": 0.7, "magnitude": 0.975}
    for leaf, value in expected.items():
        np.testing.assert_allclose(moved["moe"]["up_proj"][leaf], value, rtol=1e-6)
    np.testing.assert_allclose(moved["moe"]["router"]["kernel"], 0.975, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_only_the_step_of_b_is_multiplied_with_any_optimizer(name):
    one, eight = (
        next(_steps(config, _adapter(0.0), [_adapter(0.3)]))["moe"]
        for config in (
            OptimizerConfig(name=name, learning_rate=0.01, lora_plus_ratio=ratio, schedule=CONSTANT)
            for ratio in (1.0, 8.0)
        )
    )
    assert np.abs(one["up_proj"]["lora_B"]).min() > 0
    np.testing.assert_allclose(
        eight["up_proj"].pop("lora_B"), 8 * one["up_proj"].pop("lora_B"), rtol=1e-6
    )
    jax.tree.map(np.testing.assert_array_equal, eight, one)


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_a_ratio_must_be_positive(ratio):
    with pytest.raises(ConfigError, match="lora_plus_ratio"):
        OptimizerConfig(learning_rate=1.0, lora_plus_ratio=ratio)
