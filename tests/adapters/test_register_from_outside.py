"""A method, a router and a loss of another package: registered, configured, trained, saved, loaded.

Nothing in moe_jax knows of the three classes below; docs/extending.md shows the same steps.
"""

from dataclasses import dataclass, field

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program

from moe_jax.adapters import METHODS
from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.routing.losses import ROUTER_LOSSES, RouterLoss
from moe_jax.adapters.routing.router import ROUTERS, Router, Routing
from moe_jax.checkpoints.adapter_files import SavedAdapter, load_adapter, save_adapter
from moe_jax.config.parse import parse_member, require
from moe_jax.errors import ConfigError
from moe_jax.hf.base_model import BaseIdentity
from moe_jax.layers.frozen import adapter_leaf


class Rescale(nn.Module):
    """Multiplies a projection's outputs (arXiv:2205.05638, section 3.3)."""

    axis: str

    @nn.compact
    def __call__(self, x, frozen, context, *, deterministic):
        shape = frozen.product.shape[-1:]
        gain = adapter_leaf(self, "gain", nn.initializers.ones, shape, (self.axis,))
        return frozen.product * gain[None, None].astype(frozen.product.dtype)


@METHODS.register("outside_rescale")
@dataclass(frozen=True, kw_only=True)
class RescaleConfig(AdapterMethod):
    rank: int = 1
    alpha: float = 1.0

    def projection_adapter(self, target, axes):
        return Rescale(axes[1]) if target in self.target_modules else None


@ROUTERS.register("outside_last")
@dataclass(frozen=True, kw_only=True)
class LastExperts(Router):
    """Always the last `count` experts, equally; to be told from any learned choice."""

    count: int = 1

    def check(self, num_experts):
        require(self.count <= num_experts, "count", f"there are only {num_experts} experts")

    def route(self, router_logits, token_mask):
        probs = jax.nn.softmax(router_logits, axis=-1)
        experts = router_logits.shape[-1]
        chosen = jnp.broadcast_to(jnp.arange(experts) >= experts - self.count, probs.shape)
        load = chosen.astype(jnp.float32)
        return Routing(router_logits, probs, None, load / self.count, load)


@ROUTER_LOSSES.register("outside_first_weight")
@dataclass(frozen=True, kw_only=True)
class FirstWeight(RouterLoss):
    """The weight of expert 0 per token: zero for `LastExperts`."""

    offset: float = 0.25

    def layer_loss(self, statistics):
        return statistics.weight_sum[0] / statistics.tokens + self.offset


ROUTED = {
    **tiny_program.MIXLORA,
    "router": {"name": "outside_last", "count": 2},
    "losses": {"outside_first_weight": {"coefficient": 2.0}, "load_balance": {"coefficient": 0.1}},
}
RESCALED = {"name": "outside_rescale", "target_modules": ("q_proj", "down_proj")}


@pytest.fixture(scope="module")
def trained():
    """Both adapters after one step of plain gradient descent, beside what they were."""
    program = tiny_program.program({"routed": ROUTED, "rescaled": RESCALED}, rows=4)
    params = tiny_program.random_params(program)
    state = program.init_state(params)
    before = jax.tree.map(np.asarray, state.adapters)
    rows = sum(segment.total for segment in program.adapter_rows)
    batch = program.put_train_batch(tiny_program.random_batch(rows))
    state, metrics = program.train_step(state, params, batch)
    return program, before, jax.tree.map(np.asarray, state.adapters), jax.device_get(metrics)


def test_registered_methods_train(trained):
    _, before, after, metrics = trained
    gain = before["rescaled"]["layers"]["self_attn"]["q_proj"]["gain"]
    np.testing.assert_array_equal(gain, np.ones((3, 48)))
    assert np.abs(after["rescaled"]["layers"]["self_attn"]["q_proj"]["gain"] - gain).max() > 1e-6
    # Experts 0 and 1 of four are never chosen, so that only B of 2 and 3 moves from zero.
    moved = np.abs(after["routed"]["layers"]["mlp"]["moe"]["up_proj"]["lora_B"]).max(axis=(0, 2, 3))
    np.testing.assert_array_equal(moved[:2], 0.0)
    assert (moved[2:] > 0).all()
    # The offset alone: expert 0 has no weight.
    np.testing.assert_allclose(metrics["routed/outside_first_weight"], 0.25, rtol=1e-6)
    assert metrics["routed/dead_experts"] == 2 * 3


def test_registered_methods_are_saved_and_loaded_by_name(trained, tmp_path):
    program, _, after, _ = trained
    for segment in program.adapter_rows:
        tree = jax.tree.map(jnp.asarray, after[segment.name])
        model = tiny_program.model_config()
        folder = tmp_path / segment.name
        save_adapter(folder, SavedAdapter(segment.method, tree, model, BaseIdentity("b", "f"), 1))
        loaded = load_adapter(folder)
        assert loaded.method == segment.method
        jax.tree.map(np.testing.assert_array_equal, loaded.tree, tree)


def test_their_fields_are_checked_like_any_others():
    with pytest.raises(ConfigError, match=r"^method\.router\.count: there are only 4 experts"):
        parse_member(METHODS, {**ROUTED, "router": {"name": "outside_last", "count": 9}}, "method")
    with pytest.raises(ConfigError, match=r"did you mean 'outside_last'"):
        parse_member(METHODS, {**ROUTED, "router": {"name": "outside_lost"}}, "method")


def test_a_name_is_taken_once():
    @dataclass(frozen=True, kw_only=True)
    class Another(Router):
        losses: dict = field(default_factory=dict)

    with pytest.raises(ValueError, match=r"'outside_last' is taken by .*LastExperts"):
        ROUTERS.register("outside_last")(Another)
    assert ROUTERS["outside_last"] is LastExperts
