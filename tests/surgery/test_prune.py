"""Pruning keeps the most used experts, is exact, or measures the change."""

import jax.numpy as jnp
import numpy as np
import pytest
from foreign_adapters import LORAMOE, MIXLORA, MOLA
from tolerances import FLOAT64_ROUNDING

from moe_jax import surgery
from moe_jax.checkpoints.leaves import named_leaves, nested_dict

BY_DEPTH = {**MOLA, "num_experts": [2, 4, 3], "target_modules": ["q_proj", "up_proj"]}
ROUTER = "layers/mlp/moe/router/kernel"


@pytest.mark.parametrize(
    ("method", "keep", "counts"),
    [(MIXLORA, 2, (4, 4, 4)), (BY_DEPTH, 3, (2, 4, 3))],
)
def test_keeps_the_most_used(world, method, keep, counts):
    adapter = world.adapter(method)
    outcome = surgery.prune(adapter, keep, data=world.text)
    before, after = named_leaves(adapter.tree), named_leaves(outcome.adapter.tree)
    lost = total = 0.0
    for site, load in world.loads(adapter).items():
        (router,) = [path for path in after if path.endswith(f"{site}/router/kernel")]
        total += load.sum()
        for layer, count in enumerate(counts):
            kept = sorted(np.argsort(-load[layer, :count], kind="stable")[:keep])
            lost += load[layer].sum() - load[layer, kept].sum()
            stem = router.removesuffix("router/kernel")
            for path in (path for path in after if path.startswith(stem)):
                axis = 0 if path.endswith("lora_B") else 1
                actual = np.moveaxis(np.asarray(after[path][layer]), axis, 0)
                expected = np.moveaxis(np.asarray(before[path][layer]), axis, 0)[kept]
                np.testing.assert_array_equal(actual[: len(kept)], expected, err_msg=path)
                assert not actual[len(kept) :].any()
    assert not outcome.exact
    assert f"the others had {lost / total:.2%} of the load" in outcome.notes[0]
    assert outcome.notes[1] == "not exact: tokens that chose a dropped expert are routed to others"
    world.require_measured(outcome, adapter)


def test_dropping_an_expert_that_is_never_chosen_is_exact(world):
    """With logits (a, -a, 0, b, -b), two are never below the logit of expert 2."""
    adapter = world.adapter({**MIXLORA, "num_experts": 5})
    leaves = named_leaves(adapter.tree)
    a, _, _, b, _ = np.moveaxis(np.asarray(leaves[ROUTER]), -1, 0)
    leaves[ROUTER] = jnp.asarray(np.stack([a, -a, 0 * a, b, -b], axis=-1))
    adapter = adapter._replace(tree=nested_dict(leaves))
    outcome = surgery.prune(adapter, 4, data=world.text)
    assert outcome.exact
    assert "had 0.00% of the load" in outcome.notes[0]
    assert outcome.notes[1].startswith("exact on text.txt, up to rounding: no token in it chose")
    expected = world.logits(adapter)
    np.testing.assert_allclose(world.logits(outcome.adapter), expected, **FLOAT64_ROUNDING)
    router = np.asarray(named_leaves(outcome.adapter.tree)[ROUTER])
    np.testing.assert_array_equal(router, np.delete(np.asarray(leaves[ROUTER]), 2, axis=-1))


def test_soft_routing_is_never_exact(world, unmeasured):
    outcome = surgery.prune(world.adapter(LORAMOE), 2, data=world.text)
    assert not outcome.exact
    assert outcome.notes[1].startswith("not exact: the weights or capacity of 'soft' depend on")
