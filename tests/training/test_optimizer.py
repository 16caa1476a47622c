"""Optimizers equal those of PyTorch or short loops, and schedules those of transformers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_program
import torch
import transformers
from tolerances import ROUNDING

from moe_jax.config.optimizer import OptimizerConfig, ScheduleConfig
from moe_jax.training.step.optimizer import (
    build_optimizer,
    decay_mask,
    finite_check_state,
    label_leaves,
    learning_rate_schedule,
)

STEPS = 20
CONSTANT = ScheduleConfig(kind="constant")


def _tree(seed, shape=(3, 4)):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.standard_normal(shape).astype(np.float32)
    return {"q_proj": {"lora_A": draw(), "lora_B": draw()}, "moe": {"router": {"kernel": draw()}}}


BASE = {"kernel": np.full((2, 3), 7.0, np.float32)}


class Ours:
    """Optimizer of a program with a base and adapters, step by step."""

    def __init__(self, configs, adapters, total_steps=STEPS):
        self.optimizer = build_optimizer(configs, total_steps)
        self.adapters = jax.tree.map(jnp.asarray, adapters)
        self.state = self.optimizer.init({"params": BASE, "adapters": self.adapters})
        self._update = jax.jit(self._updated)

    def _updated(self, gradients, state, adapters):
        updates, state = self.optimizer.update(
            {"params": BASE, "adapters": gradients}, state, {"params": BASE, "adapters": adapters}
        )
        return updates, state, optax.apply_updates(adapters, updates["adapters"])

    def step(self, gradients):
        self.updates, self.state, self.adapters = self._update(gradients, self.state, self.adapters)

    def check(self, name):
        return finite_check_state(self.state, name)


def _run(config, shape=(3, 4)):
    """Makes twenty steps on gradients of different norms; yields gradients and weights of each."""
    ours = Ours({"x": config}, {"x": _tree(0, shape)})
    for step in range(STEPS):
        gradients = jax.tree.map(lambda g, s=step: g * 1.5**-s, _tree(step + 1, shape))
        ours.step({"x": gradients})
        yield gradients, jax.tree.map(np.asarray, ours.adapters["x"])


def _assert_equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), ours, theirs)


def _torch_parameters(decay):
    """Leaves as PyTorch parameters, in groups that decay the LoRA factors only."""
    leaves = {
        jax.tree_util.keystr(path): torch.nn.Parameter(torch.tensor(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(_tree(0))
    }
    groups = [
        {"params": [p], "weight_decay": 0.0 if "router" in name else decay}
        for name, p in leaves.items()
    ]
    return leaves, groups


def _follow(config, optimizer, schedule, leaves):
    """Makes the same steps in PyTorch and compares after each."""
    for gradients, adapters in _run(config):
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            leaves[jax.tree_util.keystr(path)].grad = torch.tensor(gradient)
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(leaves.values(), config.clip_norm)
        optimizer.step()
        schedule.step()
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
            theirs = leaves[jax.tree_util.keystr(path)].detach().numpy()
            np.testing.assert_allclose(leaf, theirs, **ROUNDING)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_equals_pytorch(clip_norm):
    config = OptimizerConfig(
        learning_rate=0.05,
        schedule=ScheduleConfig(kind="cosine", warmup_steps=4),
        weight_decay=0.1,
        b1=0.8,
        b2=0.95,
        eps=1e-6,
        clip_norm=clip_norm,
    )
    leaves, groups = _torch_parameters(decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 4, STEPS)
    _follow(config, optimizer, schedule, leaves)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_pytorch(momentum):
    config = OptimizerConfig(
        name="sgd",
        learning_rate=0.05,
        schedule=ScheduleConfig(kind="linear", warmup_ratio=0.1),
        momentum=momentum,
        clip_norm=1.0,
    )
    leaves, groups = _torch_parameters(decay=0.0)
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=momentum)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    _follow(config, optimizer, schedule, leaves)


def _loop(config, rule, shape=(3, 4)):
    """Compares the optimizer with `rule(memory, gradient) -> direction` and decoupled decay."""
    theirs, memory = _tree(0, shape), {}
    for step, (gradients, ours) in enumerate(_run(config, shape)):

        def moved(path, leaf, gradient, step=step):
            name = jax.tree_util.keystr(path)
            direction = rule(memory.setdefault(name, {}), gradient.astype(np.float64), step)
            decay = 0.0 if "router" in name else config.weight_decay
            return leaf - config.learning_rate * (direction + decay * leaf)

        theirs = jax.tree_util.tree_map_with_path(moved, theirs, gradients)
        _assert_equal(ours, theirs)


def test_momentum_with_decoupled_decay():
    def rule(memory, gradient, step):
        memory["m"] = 0.9 * memory.get("m", 0.0) + gradient
        return memory["m"]

    config = OptimizerConfig(
        name="sgd",
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=0.2,
        schedule=CONSTANT,
        clip_norm=None,
    )
    _loop(config, rule)


def test_lion_equals_its_formula():
    # Chen et al., arXiv:2302.06675, algorithm 2.
    def rule(memory, gradient, step):
        momentum = memory.get("m", 0.0)
        memory["m"] = 0.98 * momentum + 0.02 * gradient
        return np.sign(0.9 * momentum + 0.1 * gradient)

    config = OptimizerConfig(
        name="lion",
        learning_rate=1e-3,
        b1=0.9,
        b2=0.98,
        weight_decay=0.1,
        schedule=CONSTANT,
        clip_norm=None,
    )
    _loop(config, rule)


@pytest.mark.parametrize("shape", [(3, 4), (130, 140), (2, 130, 140)])
def test_adafactor_equals_its_formula(shape):
    # Shazeer and Stern, arXiv:1804.04235, algorithm 4 with beta_2t = 1 - t^-0.8, clipping at a root
    # mean square of one, the configured step size; factored from 128 rows and columns on.
    def rule(memory, gradient, step):
        beta, square = 1 - (step + 1) ** -0.8, gradient**2 + 1e-30
        if min(shape[-2:]) < 128:
            memory["v"] = beta * memory.get("v", 0.0) + (1 - beta) * square
            direction = gradient / np.sqrt(memory["v"])
        else:
            for name, axis in (("row", -1), ("column", -2)):
                mean = square.mean(axis=axis, keepdims=True)
                memory[name] = beta * memory.get(name, 0.0) + (1 - beta) * mean
            row, column = memory["row"], memory["column"]
            estimate = row * column / row.mean(axis=-2, keepdims=True)
            direction = gradient / np.sqrt(estimate)
        return direction / max(1.0, np.sqrt((direction**2).mean()))

    config = OptimizerConfig(
        name="adafactor", learning_rate=1e-2, weight_decay=0.1, schedule=CONSTANT, clip_norm=None
    )
    _loop(config, rule, shape)


TRANSFORMERS = {
    "constant": transformers.get_constant_schedule_with_warmup,
    "linear": lambda optimizer, warmup: transformers.get_linear_schedule_with_warmup(
        optimizer, warmup, 37
    ),
    "cosine": lambda optimizer, warmup: transformers.get_cosine_schedule_with_warmup(
        optimizer, warmup, 37
    ),
}


@pytest.mark.parametrize(
    ("kind", "warmup", "fields"),
    [
        (kind, warmup, fields)
        for kind, (warmup, fields) in itertools.product(
            TRANSFORMERS,
            [
                (0, {}),
                (5, {"warmup_steps": 5}),
                (4, {"warmup_ratio": 0.1}),  # 3.7 of 37 steps
                (36, {"warmup_steps": 36}),
            ],
        )
    ],
)
def test_schedules_equal_transformers_over_a_whole_run(kind, warmup, fields):
    ours = learning_rate_schedule(ScheduleConfig(kind=kind, **fields), 0.25, 37)
    rates = np.asarray(jax.vmap(ours)(jnp.arange(38)))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    schedule = TRANSFORMERS[kind](optimizer, warmup)
    for rate in rates:
        np.testing.assert_allclose(rate, schedule.get_last_lr()[0], **ROUNDING)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("kind", "expected"),
    # Four steps of decay from 1 to 0.2: a straight line; 0.2 + 0.8 * (1 + cos(pi t / 4)) / 2.
    [
        ("linear", [0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", [0.0, 0.5, 1.0, 0.6 + 0.4 * 0.5**0.5, 0.6, 0.6 - 0.4 * 0.5**0.5, 0.2, 0.2]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_decay_ends_at_the_final_fraction(kind, expected):
    schedule = ScheduleConfig(kind=kind, warmup_steps=2, final_fraction=0.2)
    rates = jax.vmap(learning_rate_schedule(schedule, 1.0, 6))(jnp.arange(8))
    np.testing.assert_allclose(rates, expected, **ROUNDING)


def test_reported_learning_rates_are_the_applied_ones():
    schedule = {"kind": "linear", "warmup_steps": 2}
    slow = {"learning_rate": 1e-3, "lora_plus_ratio": 8.0, "schedule": schedule}  # 8e-3 for B
    method = {**tiny_program.LORA, "target_modules": ("q_proj",)}
    program = tiny_program.program({"x": method}, optimizer=slow, total_steps=6)
    rates = [program.learning_rates(done)["x"] for done in range(7)]
    expected = [0.0, 5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-10)


def test_routers_and_magnitudes_are_not_decayed():
    up = {**_tree(0)["q_proj"], "magnitude": 0}
    tree = {"layers": {"mlp": {"moe": {"up_proj": up, "router": {"kernel": 0}}}}}
    assert decay_mask(tree)["layers"]["mlp"]["moe"] == {
        "up_proj": {"lora_A": True, "lora_B": True, "magnitude": False},
        "router": {"kernel": False},
    }


def test_labels_take_the_first_rule_that_matches():
    tree = {"params": {"a": 0}, "adapters": {"x": {"a": 0}, "xy": {"a": 0}}}
    rules = [("params/", "frozen"), ("adapters/x/", "x"), ("adapters/", "others")]
    assert label_leaves(tree, rules) == {
        "params": {"a": "frozen"},
        "adapters": {"x": {"a": "x"}, "xy": {"a": "others"}},
    }


def test_a_leaf_without_a_rule_raises():
    with pytest.raises(ValueError, match="no optimizer rule matches the parameter adapters/y/a"):
        label_leaves({"adapters": {"x": {"a": 0}, "y": {"a": 0}}}, [("adapters/x/", "x")])
    optimizer = build_optimizer({"x": OptimizerConfig(learning_rate=1.0)}, 1)
    with pytest.raises(ValueError, match="matches the parameter adapters/y/"):
        optimizer.init({"params": BASE, "adapters": {"y": _tree(0)}})


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor"])
def test_the_base_is_frozen(name):
    config = OptimizerConfig(
        name=name, learning_rate=0.1, weight_decay=0.1, momentum=0.5, schedule=CONSTANT
    )
    adapters = {"x": _tree(0), "y": _tree(1)}
    ours = Ours({"x": config, "y": config}, adapters)
    assert jax.tree.leaves(ours.state.inner_states["frozen"]) == []
    assert all(leaf.shape != (2, 3) for leaf in jax.tree.leaves(ours.state))
    ours.step({"x": _tree(2), "y": _tree(3)})
    np.testing.assert_array_equal(ours.updates["params"]["kernel"], 0.0)
    # Every leaf of the adapters moves.
    moved = jax.tree.map(lambda a, b: (a != b).all(), ours.adapters, adapters)
    assert all(jax.tree.leaves(moved))


def test_adamw_state_is_two_moments_of_each_adapter_leaf_and_counters():
    ours = Ours({"x": OptimizerConfig(learning_rate=0.1)}, {"x": _tree(0)})
    sizes = [leaf.size for leaf in jax.tree.leaves(ours.state)]
    assert sorted(size for size in sizes if size > 1) == [12] * 6


def test_each_adapter_is_clipped_by_hand():
    # x: two leaves of 3 and 4 are a norm of 5, cut to 1; y is within its limit.
    config = OptimizerConfig(name="sgd", learning_rate=1.0, schedule=CONSTANT, clip_norm=1.0)
    zero = np.zeros(1, np.float32)
    adapters = {"x": {"lora_A": zero, "lora_B": zero}, "y": {"lora_A": zero}}
    ours = Ours({"x": config, "y": config}, adapters)
    gradients = {"x": {"lora_A": zero + 3, "lora_B": zero + 4}, "y": {"lora_A": zero + 0.75}}
    ours.step(gradients)
    expected = {"x": {"lora_A": zero - 0.6, "lora_B": zero - 0.8}, "y": {"lora_A": zero - 0.75}}
    _assert_equal(ours.adapters, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_gradient_is_skipped_and_counted(bad):
    config = OptimizerConfig(
        learning_rate=0.1, weight_decay=0.1, schedule=ScheduleConfig(kind="linear")
    )
    start = {"x": _tree(0), "y": _tree(1)}
    ours, untouched = (Ours({"x": config, "y": config}, start) for _ in range(2))
    broken = _tree(2)
    broken["moe"]["router"]["kernel"][1, 2] = bad
    good = {"x": _tree(2), "y": _tree(3)}

    for times in (1, 2):
        ours.step({"x": broken, "y": good["y"]})
        untouched.step(good)
        jax.tree.map(np.testing.assert_array_equal, ours.adapters["x"], start["x"])
        inner = ours.check("x").inner_state
        assert all(
            not leaf.any() for leaf in jax.tree.leaves(inner)
        )  # moments, and the count of the schedule
        assert int(ours.check("x").notfinite_count) == times
        assert int(ours.check("x").total_notfinite) == times
        assert not ours.check("x").last_finite
        assert int(ours.check("y").total_notfinite) == 0
        _assert_equal(ours.adapters["y"], untouched.adapters["y"])

    ours.step(good)
    first = Ours({"x": config}, {"x": start["x"]})
    first.step({"x": good["x"]})
    _assert_equal(ours.adapters["x"], first.adapters["x"])  # as without the two steps
    assert int(ours.check("x").notfinite_count) == 0
    assert int(ours.check("x").total_notfinite) == 2
    assert ours.check("x").last_finite
