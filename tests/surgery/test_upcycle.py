"""Upcycling a LoRA: exact if the weights of a token's experts sum to one, else measured."""

import numpy as np
import pytest
from foreign_adapters import ATTENTION, LORA
from tolerances import FLOAT32_LOGITS, FLOAT64_ROUNDING

import moe_jax
from moe_jax import surgery
from moe_jax.checkpoints.leaves import named_leaves

CERTAIN = {"name": "switch", "capacity_factor": 3.0, "weights": "straight_through"}


@pytest.mark.parametrize(
    ("to", "experts", "router", "kind"),
    [
        ("mixlora", 4, None, {}),
        ("mixlora", 3, {"name": "soft"}, {"rslora": True}),
        ("mixlora", 3, CERTAIN, {"dora": True}),
        ("mixlora", 3, {"name": "top_p", "top_p": 0.5}, {"target_modules": ["q_proj", "up_proj"]}),
        ("loramoe", 3, None, {"dora": True}),
        ("mola", (2, 4, 3), None, {}),
        ("mola", (3,), {"name": "top_p", "top_p": 0.6}, {"dora": True}),
    ],
)
def test_equals_the_lora(world, to, experts, router, kind):
    lora = world.adapter({**LORA, **kind})
    outcome = surgery.upcycle(lora, to, num_experts=experts, router=router)
    expected = world.logits(lora)
    np.testing.assert_allclose(world.logits(outcome.adapter), expected, **FLOAT64_ROUNDING)
    assert np.abs(expected - world.logits(None)).max() > 1000 * FLOAT32_LOGITS
    assert outcome.exact
    assert outcome.notes[0].startswith("exact: ")
    assert outcome.adapter.base == lora.base and outcome.adapter.step == lora.step
    for field in ("rank", "alpha", "rslora", "dora", "target_modules"):
        assert getattr(outcome.adapter.method, field) == getattr(lora.method, field)


def test_equal_logits_in_moe_jax(world, tmp_path):
    lora = world.adapter(LORA)
    outcome = surgery.upcycle(lora, num_experts=4, data=world.text, output=tmp_path / "out")
    assert outcome.change is not None and outcome.change.largest < FLOAT32_LOGITS
    assert "below 1e-07 nats per token" in outcome.notes[-1]
    model = moe_jax.AdaptedModel(world.base, {"x": moe_jax.load_adapter(tmp_path / "out")})
    actual = np.asarray(model(world.rows, "x"))
    np.testing.assert_allclose(actual, world.logits(lora), rtol=0, atol=FLOAT32_LOGITS)


def test_leaves(world):
    """Routers are random, pairs of attention are the LoRA's, and absent experts are zero."""
    lora = world.adapter(LORA)
    before = named_leaves(lora.tree)
    first, other = (surgery.upcycle(lora, num_experts=4, seed=seed) for seed in (0, 1))
    leaves, others = named_leaves(first.adapter.tree), named_leaves(other.adapter.tree)
    router = np.asarray(leaves["layers/mlp/moe/router/kernel"])
    assert router.shape == (3, 32, 4)
    assert router.std() == pytest.approx(0.02, rel=0.1)
    assert (router != others["layers/mlp/moe/router/kernel"]).all()
    for target in ATTENTION:
        path = f"layers/self_attn/{target}/lora_B"
        np.testing.assert_array_equal(leaves[path], before[path])
    mola = surgery.upcycle(lora, "mola", num_experts=(2, 4, 3)).adapter
    absent = np.array([[e >= n for e in range(4)] for n in (2, 4, 3)])
    for path, leaf in named_leaves(mola.tree).items():
        axis = 1 if path.endswith("lora_B") else 2
        used = np.moveaxis(np.asarray(leaf), axis, 1).any(axis=(2, 3) if leaf.ndim == 4 else 2)
        np.testing.assert_array_equal(used, ~absent, err_msg=path)


@pytest.mark.parametrize(
    ("router", "reason"),
    [
        ({"name": "top_p", "top_p": 0.5, "renormalise": False}, "without renormalise sum to less"),
        ({**CERTAIN, "weights": "probability"}, "multiplies its expert by a probability"),
        ({**CERTAIN, "sparse_step": 2}, "with sparse_step 2 some FFNs do not get the LoRA"),
        ({**CERTAIN, "capacity_factor": 2.9}, "capacity_factor 3.0 avoids this"),
    ],
)
def test_inexact_upcycling_requires_a_text(world, router, reason):
    with pytest.raises(
        moe_jax.UserError, match=f"^data: .*{reason}.* give a text file with `data`"
    ):
        surgery.upcycle(world.adapter(LORA), num_experts=3, router=router)


def test_inexact_upcycling_is_measured(world):
    lora = world.adapter(LORA)
    router = {"name": "top_p", "top_p": 0.5, "renormalise": False}
    outcome = surgery.upcycle(lora, num_experts=3, router=router, data=world.text)
    assert not outcome.exact
    assert outcome.notes[0].startswith("not exact: the weights of 'top_p' without renormalise")
    world.require_measured(outcome, lora)
