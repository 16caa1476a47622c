"""Merged experts, compared with the nearest pairs to the mean of full products."""

import numpy as np
import pytest
from foreign_adapters import LORA, MIXLORA, MOLA
from tolerances import FLOAT32_LOGITS, ROUNDING

from moe_jax import surgery
from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.surgery.merge import product_gram, similar_groups
from moe_jax.surgery.truncation import nearest_pair, nearest_pair_of_product, relative_error


def products(adapter, stem, layer):
    """Products of the experts of a projection, [E, in, out]."""
    leaves = named_leaves(adapter.tree)
    a, b = (np.asarray(leaves[f"{stem}/{n}"][layer], float) for n in ("lora_A", "lora_B"))
    return np.einsum("der,ero->edo", a, b)


@pytest.mark.parametrize("weights", ["average", "utilization"])
def test_groups(world, weights):
    adapter = world.adapter(MIXLORA)
    groups = [[0, 2, 3], [1]]
    outcome = surgery.merge(adapter, groups=groups, weights=weights, data=world.text)
    (load,) = world.loads(adapter).values()
    before, after = named_leaves(adapter.tree), named_leaves(outcome.adapter.tree)
    square = lost = 0.0
    for layer in range(3):
        share = load[layer, groups[0]] if weights == "utilization" else np.ones(3)
        share = share / share.sum()
        for target in ("gate_proj", "up_proj", "down_proj"):
            stem = f"layers/mlp/moe/{target}"
            experts = products(adapter, stem, layer)
            mean = np.einsum("e,edo->do", share, experts[groups[0]])
            u, sizes, vt = np.linalg.svd(mean)
            nearest = (u[:, :4] * sizes[:4]) @ vt[:4]
            actual = products(outcome.adapter, stem, layer)
            np.testing.assert_allclose(actual[0], nearest, **ROUNDING)
            np.testing.assert_array_equal(actual[1], experts[1])
            square += np.square(mean).sum() + np.square(experts[1]).sum()
            lost += np.square(sizes[4:]).sum()
        path = "layers/mlp/moe/router/kernel"
        column = np.asarray(before[path][layer])[:, groups[0]] @ share
        np.testing.assert_allclose(after[path][layer][:, 0], column, **ROUNDING)
    assert f"a relative error of {(lost / square) ** 0.5:.3g}; largest in" in outcome.notes[2]
    assert outcome.notes[1].startswith("not exact: means replace experts that differ")
    world.require_measured(outcome, adapter)


def test_merging_all_copies_restores_the_lora(world):
    lora = world.adapter(LORA)
    mixture = surgery.upcycle(lora, "mola", num_experts=(2, 4, 3)).adapter
    outcome = surgery.merge(mixture, into=1, data=world.text)
    assert outcome.exact
    assert outcome.adapter.method == lora.method
    assert isinstance(outcome.adapter.method, LoraConfig)
    actual, expected = world.logits(outcome.adapter), world.logits(lora)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32_LOGITS)
    assert max(outcome.weight_errors.values()) < 1e-12


def test_the_nearest_experts_are_merged(world, unmeasured):
    """Each layer merges on its own; a layer with few experts keeps all."""
    adapter = world.adapter({**MOLA, "num_experts": [2, 4, 3], "target_modules": ["up_proj"]})
    outcome = surgery.merge(adapter, into=3, data=world.text)
    assert outcome.adapter.method.num_experts == (2, 3, 3)
    stem = "layers/mlp/up_proj"
    experts = products(adapter, stem, 1)
    distance = np.square(experts[:, None] - experts[None]).sum(axis=(2, 3))
    distance[np.tril_indices(4)] = np.inf
    pair = sorted(np.unravel_index(distance.argmin(), (4, 4)))
    rest = [e for e in range(4) if e not in pair]
    actual = products(outcome.adapter, stem, 1)
    order = sorted([pair, *([e] for e in rest)])
    for index, group in enumerate(order):
        if len(group) == 1:
            np.testing.assert_array_equal(actual[index], experts[group[0]])
    np.testing.assert_array_equal(
        products(outcome.adapter, stem, 0)[:2], products(adapter, stem, 0)[:2]
    )


def test_inner_products_and_groups():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 3, 2)), rng.standard_normal((3, 2, 7))
    whole = np.einsum("der,ero->edo", a, b).reshape(3, -1)
    np.testing.assert_allclose(product_gram(a, b), whole @ whole.T, **ROUNDING)
    # On a line at 0, 10, 1, 11.5 and 30: merges 0 and 1, then 10 and 11.5, then the two pairs.
    points = np.array([0.0, 10.0, 1.0, 11.5, 30.0])
    gram = np.outer(points, points)
    assert similar_groups(gram, 4) == [[0, 2], [1], [3], [4]]
    assert similar_groups(gram, 3) == [[0, 2], [1, 3], [4]]
    assert similar_groups(gram, 2) == [[0, 1, 2, 3], [4]]


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_nearest_pairs(shape):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal(shape)
    u, sizes, vt = np.linalg.svd(matrix, full_matrices=False)
    for part in (
        nearest_pair(matrix, 3, rng),
        nearest_pair_of_product(matrix, np.eye(shape[1]), 3, rng),
    ):
        np.testing.assert_allclose(
            part.lora_a @ part.lora_b, (u[:, :3] * sizes[:3]) @ vt[:3], **ROUNDING
        )
        expected = np.sqrt(np.square(sizes[3:]).sum() / np.square(sizes).sum())
        assert relative_error([part]) == pytest.approx(expected)


def test_columns_beyond_the_rank_are_trainable():
    """Beyond the rank of the matrix, A's columns are random and B's rows zero."""
    matrix = np.outer(np.arange(1.0, 7.0), np.ones(5))
    for given in (matrix, 0 * matrix):
        part = nearest_pair(given, 3, np.random.default_rng(0))
        rank = int(given.any())
        np.testing.assert_allclose(part.lora_a @ part.lora_b, given, **ROUNDING)
        assert not part.lora_b[rank:].any()
        assert part.lora_a.all() and np.abs(part.lora_a[:, rank:]).max() <= 6**-0.5
