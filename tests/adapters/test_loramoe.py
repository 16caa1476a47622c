"""LoRAMoE against a plain loop over experts, and against figures recorded from MoE-PEFT."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import mixture_oracle
import numpy as np
import pytest
import tiny_program
from tolerances import ROUNDING

from moe_jax.adapters import METHODS, LoraMoeConfig
from moe_jax.adapters.lora.low_rank import LowRankConfig
from moe_jax.adapters.method import AdapterContext, FrozenProjection
from moe_jax.adapters.mixtures.mixture import ProjectionMixture
from moe_jax.adapters.routing.strategies import SoftRouter
from moe_jax.config.parse import parse_member
from moe_jax.errors import ConfigError

LORAMOE = {
    "name": "loramoe",
    "rank": 4,
    "alpha": 8.0,
    "target_modules": tiny_program.ALL_TARGETS,
    "num_experts": 4,
}
CASES = {
    "attention_and_ffn": {"target_modules": ("q_proj", "o_proj", "gate_proj", "down_proj")},
    "dora_and_rslora": {
        "dora": True,
        "rslora": True,
        "num_experts": 6,
        "target_modules": ("v_proj", "up_proj", "down_proj"),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_forward_losses_and_all_gradients_equal_a_loop_over_experts(tmp_path, case):
    method = {**LORAMOE, **CASES[case]}
    mixture_oracle.assert_training_step_equals(tmp_path, method, [method["num_experts"]] * 3)


def test_logits_and_gradients_equal_recorded_figures():
    method = parse_member(METHODS, LORAMOE, "method")
    mixture_oracle.assert_equals_recorded_figures("loramoe", method, coefficient=0.0)


@dataclass(frozen=True, kw_only=True)
class OddLayers(SoftRouter):
    """Leaves every other layer frozen."""

    def routes_layer(self, layer_index):
        return layer_index % 2 == 1


def _normal(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


X, KERNEL = _normal(2, 5, 8, seed=0), _normal(8, 6, seed=1)
LEAVES = {
    "lora_A": _normal(8, 3, 2, seed=2),
    "lora_B": _normal(3, 2, 6, seed=3),
    "router": {"kernel": _normal(8, 3, seed=4)},
}


class TestOneProjection:
    """The module by itself: 2 rows of 5 tokens, 8 inputs, 6 outputs, 3 experts."""

    def _run(self, layer=1, router=None, dropout=0.0, deterministic=False, leaves=LEAVES):
        """The adapted product and its statistics; None makes fresh leaves."""
        low_rank = LowRankConfig(rank=2, alpha=3.0, dropout=dropout)
        module = ProjectionMixture(low_rank, router or SoftRouter(), (3,), ("embed", "mlp"))
        mask, key = jnp.ones((2, 5), bool), jax.random.key(1)
        context = AdapterContext(mask, jnp.int32(layer), num_layers=2, dropout_key=key)
        y, made = module.apply(
            {} if leaves is None else {"adapters": leaves},
            jnp.asarray(X),
            FrozenProjection(jnp.asarray(X @ KERNEL), jnp.asarray(KERNEL)),
            context,
            deterministic=deterministic,
            rngs={"adapters": jax.random.key(0), "dropout": key},
            mutable=["adapters", "router"],
        )
        return np.asarray(y), made["router"]["statistics"]

    def test_an_untrained_mixture_leaves_the_projection_as_it_is(self):
        fresh, _ = self._run(leaves=None)
        np.testing.assert_allclose(fresh, X @ KERNEL, **ROUNDING)
        assert np.abs(self._run()[0] - fresh).max() > 0.1

    def test_layers_that_the_router_leaves_out_stay_frozen_and_report_nothing(self):
        routed, statistics = self._run(layer=1, router=OddLayers())
        np.testing.assert_array_equal(routed, self._run()[0])
        assert float(statistics.routed) == 1 and float(statistics.tokens) == 10
        frozen, statistics = self._run(layer=0, router=OddLayers())
        np.testing.assert_array_equal(frozen, X @ KERNEL)
        assert float(statistics.routed) == float(statistics.tokens) == 0

    def test_dropout_hides_inputs_of_the_experts_and_not_of_the_router(self):
        calm, expected = self._run()
        dropped, statistics = self._run(dropout=0.5)
        jax.tree.map(np.testing.assert_array_equal, statistics, expected)
        assert np.abs(dropped - calm).max() > 0.1
        np.testing.assert_array_equal(self._run(dropout=0.5, deterministic=True)[0], calm)

    def test_jitter_disturbs_the_router_while_training_only(self):
        calm, expected = self._run()
        noisy, statistics = self._run(router=SoftRouter(jitter_noise=0.3))
        assert np.abs(statistics.probability_sum - expected.probability_sum).max() > 1e-2
        assert np.abs(noisy - calm).max() > 1e-2
        _, statistics = self._run(router=SoftRouter(jitter_noise=0.3), deterministic=True)
        jax.tree.map(np.testing.assert_array_equal, statistics, expected)


SWITCH = {"name": "switch", "capacity_factor": 1.0}


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("target_modules", {"target_modules": ["q_proj"]}, "at least one of gate_proj, up_proj"),
        ("num_experts", {"num_experts": 1}, "must be at least 2; for one use 'lora'"),
        ("router.top_k", {"router": {"name": "top_k", "top_k": 5}}, "there are only 4"),
        ("router.name", {"router": SWITCH}, "'switch' limits how many tokens an expert serves"),
        ("routers", {"routers": {}}, "did you mean 'router'?"),
    ],
)
def test_contradictions_are_refused_by_field(field, change, message):
    with pytest.raises(ConfigError) as refused:
        parse_member(METHODS, {**LORAMOE, **change}, "method")
    assert str(refused.value).startswith(f"method.{field}: ")
    assert message in str(refused.value)


def test_all_experts_are_mixed_unless_another_router_is_named():
    method = parse_member(METHODS, LORAMOE, "method")
    assert isinstance(method, LoraMoeConfig)
    assert method.router == SoftRouter()
    other = parse_member(METHODS, {**LORAMOE, "router": {"name": "top_p", "top_p": 0.7}}, "method")
    assert type(other.router).__name__ == "TopPRouter"
