"""Splitting experts: exact copies, noise, and measured changes."""

import numpy as np
import pytest
from foreign_adapters import LORAMOE, MIXLORA, MOLA
from tolerances import FLOAT64_ROUNDING

import moe_jax
from moe_jax import surgery
from moe_jax.checkpoints.leaves import named_leaves

TOP_1 = {"name": "top_k", "top_k": 1}
SWITCH = {"name": "switch", "capacity": 24, "weights": "straight_through"}
TOP_P_ONE = {"name": "top_p", "top_p": 1.0}


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (MIXLORA, {"times": 2}),
        ({**MIXLORA, "router": {"name": "soft"}}, {"times": 3}),
        ({**MIXLORA, "router": TOP_P_ONE, "dora": True}, {"times": 2}),
        ({**MIXLORA, "router": SWITCH}, {"times": 2}),
        ({**MIXLORA, "router": SWITCH}, {"add": 1, "split": (2,)}),
        ({**MIXLORA, "router": TOP_1}, {"add": 3, "split": (0, 0, 3)}),
        (LORAMOE, {"times": 2}),
        ({**MOLA, "num_experts": [2, 4, 3]}, {"times": 2}),
        ({**MOLA, "num_experts": [2, 4, 3], "router": TOP_1}, {"add": 2, "split": (1, 0)}),
    ],
)
def test_exact_without_noise(world, method, arguments):
    adapter = world.adapter(method)
    outcome = surgery.grow(adapter, noise=0.0, **arguments)
    assert outcome.exact
    expected = world.logits(adapter)
    np.testing.assert_allclose(world.logits(outcome.adapter), expected, **FLOAT64_ROUNDING)
    assert any(note.startswith("exact, up to rounding") for note in outcome.notes)
    number = adapter.method.num_experts
    more = lambda n: n * arguments["times"] if "times" in arguments else n + arguments["add"]
    grown = tuple(map(more, number)) if isinstance(number, tuple) else more(number)
    assert outcome.adapter.method.num_experts == grown


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (MIXLORA, {"add": 1, "split": (1,)}),
        (LORAMOE, {"add": 1, "split": (1,)}),
        ({**MIXLORA, "router": {**SWITCH, "weights": "probability"}}, {"times": 2}),
        ({**MIXLORA, "router": {"name": "top_p", "top_p": 0.6}}, {"times": 2}),
    ],
)
def test_inexact_copies_require_a_text(world, method, arguments):
    with pytest.raises(moe_jax.UserError, match=r"^data: the result is not exact, so the"):
        surgery.grow(world.adapter(method), noise=0.0, **arguments)


def test_splits_the_most_used_with_noise(world):
    adapter = world.adapter(MIXLORA)
    outcome = surgery.grow(adapter, add=2, noise=0.1, data=world.text)
    (load,) = world.loads(adapter).values()
    before, after = named_leaves(adapter.tree), named_leaves(outcome.adapter.tree)
    for path in (path for path in after if "/moe/" in path):
        axis = 0 if path.endswith("lora_B") else 1
        for layer in range(3):
            # The first copy halves the largest load, the second the largest load after that.
            first = int(load[layer].argmax())
            left = load[layer] / (1 + (np.arange(4) == first))
            parents = [first, int(left.argmax())]
            old, new = (np.moveaxis(np.asarray(t[path][layer]), axis, 0) for t in (before, after))
            np.testing.assert_array_equal(new[:4], old, err_msg=path)
            noise = (new[4:] - old[parents]).reshape(2, -1)
            size = np.sqrt(np.square(old[parents].reshape(2, -1)).mean(axis=1))
            np.testing.assert_allclose(noise.std(axis=1) / size, 0.1, rtol=0.4)
    assert not outcome.exact
    assert "not exact: copies take tokens or probability from other experts" in outcome.notes
    world.require_measured(outcome, adapter)


def test_noise_is_seeded(world, unmeasured):
    adapter = world.adapter({**MIXLORA, "router": TOP_1})
    path = "layers/mlp/moe/up_proj/lora_B"
    grow = lambda seed: surgery.grow(adapter, times=2, seed=seed, data=world.text).adapter.tree
    first, same, other = (np.asarray(named_leaves(grow(seed))[path]) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first[:, 1::2] != other[:, 1::2]).all()
    np.testing.assert_array_equal(first[:, ::2], other[:, ::2])
