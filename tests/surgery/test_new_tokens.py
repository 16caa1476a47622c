"""Surgery on adapters with new tokens keeps their rows, and reads texts that have them."""

import numpy as np
import pytest
from foreign_adapters import LORA, MIXLORA
from tolerances import FLOAT32_LOGITS

import moe_jax
from moe_jax import surgery
from moe_jax.checkpoints.leaves import named_leaves

NEW = {"new_tokens": ["<a>", "</a>"], "new_token_id": 64}
TOKENS = np.array([[3, 64, 7, 65, 9, 64, 1]])


def logits(world, adapter):
    return np.asarray(moe_jax.AdaptedModel(world.base, {"x": adapter})(TOKENS, "x"))


@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(lambda a, text: surgery.upcycle(a, num_experts=3), id="upcycle"),
        pytest.param(lambda a, text: surgery.grow(a, times=2, noise=0.0), id="grow"),
        pytest.param(lambda a, text: surgery.prune(a, keep=2, data=text), id="prune"),
        pytest.param(lambda a, text: surgery.merge(a, into=1, data=text), id="merge"),
    ],
)
def test_rows_are_kept(world, tmp_path, request, operation):
    name = request.node.callspec.id
    former = world.adapter({**(LORA if name == "upcycle" else MIXLORA), **NEW})
    text = tmp_path / "text.txt"
    text.write_text("w1 <a> w5 w7 </a> w9 " * 10)
    outcome = operation(former, text)
    assert outcome.adapter.method.new_tokens == ("<a>", "</a>")
    assert outcome.adapter.method.new_token_id == 64
    before, after = named_leaves(former.tree), named_leaves(outcome.adapter.tree)
    for path in ("new_tokens/embedding", "new_tokens/head"):
        np.testing.assert_array_equal(after[path], before[path])
    changed, expected = logits(world, outcome.adapter), logits(world, former)
    assert changed.shape == (1, 7, 66)
    if outcome.exact:
        np.testing.assert_allclose(changed, expected, rtol=0, atol=FLOAT32_LOGITS)
