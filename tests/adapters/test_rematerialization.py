"""Rematerialization policies change the cost of a step, not its result."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import GRADIENT_ROUNDING

from moe_jax.config.model import ComputeConfig
from moe_jax.models.remat import REMAT_POLICIES

METHODS = {
    "experts": {**tiny_program.MIXLORA, "dropout": 0.1},
    "any_expert": {**tiny_program.MIXLORA, "router": {"name": "top_p", "top_p": 0.6}},
    "directions": {**tiny_program.MIXLORA, "dora": True, "ffn_dropout": 0.1},
    "mixture": {
        "name": "loramoe",
        **{key: tiny_program.MIXLORA[key] for key in ("rank", "alpha", "target_modules")},
        "num_experts": 3,
    },
    "pairs": {**tiny_program.LORA, "dora": True},
}


def _program(remat, **compute):
    return tiny_program.program(METHODS, rows=2, compute={"remat": remat, **compute})


@pytest.fixture(scope="module")
def start():
    program = _program("none")
    return tiny_program.random_params(program), tiny_program.random_adapters(program)


def _after_a_step(program, start):
    params, adapters = start
    state = dataclasses.replace(
        program.init_state(params), adapters=jax.tree.map(jnp.copy, adapters)
    )
    batch = program.put_train_batch(tiny_program.random_batch(2 * len(METHODS)))
    return program.train_step(state, params, batch)[0].adapters


@pytest.fixture(scope="module")
def expected(start):
    return _after_a_step(_program("none"), start)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_every_policy_makes_the_same_step(remat, start, expected):
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **GRADIENT_ROUNDING),
        _after_a_step(_program(remat), start),
        expected,
    )


def test_the_configuration_offers_every_policy():
    offered = typing.get_args(typing.get_type_hints(ComputeConfig)["remat"])
    assert offered == ("none", *REMAT_POLICIES)


def test_the_step_moves_every_leaf(start, expected):
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), expected, start[1])
    assert min(jax.tree.leaves(moved)) > 1e-6
