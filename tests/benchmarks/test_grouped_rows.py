"""Products of rows sorted by expert, and of the one-hot form, equal a plain loop over the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapted_ffn import AdaptedFFN, llama_mlp, mixlora, random_input
from tolerances import GRADIENT_ROUNDING, ROUNDING

from benchmarks import dispatch_forms as forms
from benchmarks.grouped_mixlora import group_mixlora
from benchmarks.grouped_rows import block_count, group_rows, rows_of_block
from moe_jax.config.parse import FieldError

TOKENS, SLOTS, EXPERTS, RANK, WIDTH, FFN_WIDTH = 13, 2, 3, 2, 5, 7
"""26 rows, which neither 3 experts nor blocks of 8 divide."""


def _choices():
    """Experts of each token's slots; 3 for a slot without an expert."""
    random = np.random.default_rng(0)
    any_two = np.stack([random.permutation(EXPERTS)[:SLOTS] for _ in range(TOKENS)])
    overflown = any_two.copy()
    overflown[::3, 1], overflown[4] = EXPERTS, EXPERTS
    return {
        "any two": any_two,
        "some by none": overflown,
        "all by one": np.full((TOKENS, SLOTS), 1),
        "all by none": np.full((TOKENS, SLOTS), EXPERTS),
    }


def _random(*shape):
    return np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape).astype(np.float32)


def _loop(rows, matrices, choice, cotangent):
    """Row by row in float64: products, and the gradients of `rows` [C, T, in] and `matrices`."""
    rows, matrices = rows.astype(float), matrices.astype(float)
    outputs = np.zeros(cotangent.shape)
    row_gradients, matrix_gradients = np.zeros_like(rows), np.zeros_like(matrices)
    for token, slots in enumerate(choice):
        for slot, expert in enumerate(slots):
            if expert < EXPERTS:
                outputs[slot, token] = rows[slot, token] @ matrices[expert]
                row_gradients[slot, token] = matrices[expert] @ cotangent[slot, token]
                matrix_gradients[expert] += np.outer(rows[slot, token], cotangent[slot, token])
    return outputs, row_gradients, matrix_gradients


@pytest.fixture(scope="module")
def compiled():
    """Outputs and gradients of both products in every form; each compiled once for all choices."""

    def all_of(form):
        def activations(choice, cotangent, x, lora_a):
            make = lambda x, lora_a: forms.activations(form, x, lora_a, choice)
            outputs, pull_back = jax.vjp(make, x, lora_a)
            return outputs, *pull_back(cotangent)

        def expansion(choice, cotangent, product, z, lora_b):
            make = lambda z, lora_b: forms.expansion(form, product, z, lora_b, choice)
            outputs, pull_back = jax.vjp(make, z, lora_b)
            return outputs, *pull_back(cotangent)

        return jax.jit(activations), jax.jit(expansion)

    return {form: all_of(form) for form in forms.FORMS}


@pytest.mark.parametrize("case", _choices())
@pytest.mark.parametrize("form", forms.FORMS)
def test_activations_and_their_gradients_equal_a_plain_loop(compiled, form, case):
    choice = _choices()[case]
    x, lora_a = _random(TOKENS, WIDTH), _random(WIDTH, EXPERTS, RANK)
    cotangent = _random(SLOTS, TOKENS, RANK)
    outputs, x_gradients, a_gradients = compiled[form][0](choice, cotangent, x, lora_a)
    rows, by_expert = np.stack([x] * SLOTS), lora_a.transpose(1, 0, 2)
    expected, row_gradients, matrix_gradients = _loop(rows, by_expert, choice, cotangent)
    np.testing.assert_allclose(outputs, expected, **ROUNDING)
    np.testing.assert_allclose(x_gradients, row_gradients.sum(axis=0), **GRADIENT_ROUNDING)
    np.testing.assert_allclose(
        a_gradients, matrix_gradients.transpose(1, 0, 2), **GRADIENT_ROUNDING
    )
    assert np.any(expected) == (case != "all by none")


@pytest.mark.parametrize("case", _choices())
@pytest.mark.parametrize("form", forms.FORMS)
def test_expansions_and_their_gradients_equal_a_plain_loop(compiled, form, case):
    choice = _choices()[case]
    product, z = _random(TOKENS, FFN_WIDTH), _random(TOKENS, EXPERTS, RANK)
    lora_b, cotangent = _random(EXPERTS, RANK, FFN_WIDTH), _random(SLOTS, TOKENS, FFN_WIDTH)
    outputs, z_gradients, b_gradients = compiled[form][1](choice, cotangent, product, z, lora_b)
    some = np.minimum(choice, EXPERTS - 1)  # `_loop` leaves out what is chosen by none
    rows = z[np.arange(TOKENS)[:, None], some].transpose(1, 0, 2)
    expected, row_gradients, matrix_gradients = _loop(rows, lora_b, choice, cotangent)
    np.testing.assert_allclose(outputs, product + expected, **ROUNDING)
    np.testing.assert_allclose(b_gradients, matrix_gradients, **GRADIENT_ROUNDING)
    expected_z = np.zeros(z.shape)
    for slot in range(SLOTS):
        np.add.at(expected_z, (np.arange(TOKENS), some[:, slot]), row_gradients[slot])
    np.testing.assert_allclose(z_gradients, expected_z, **GRADIENT_ROUNDING)


def test_every_row_is_in_a_block_of_its_expert():
    # Experts 0, 1 and 2 have 1, 4 and 2 rows, and one row has none. Blocks of 2 rows: 1, 2 and 1,
    # and of 8 rows three experts may need at most (8 + 3) // 2 = 5, so that one is left over.
    choice = jnp.asarray([[1, 2], [1, 0], [1, 3], [2, 1]])
    groups = jax.jit(lambda choice: group_rows(choice, experts=3, block=2))(choice)
    assert block_count(8, 3, 2) == 5
    # Row c 4 + t: slot 0 has experts 1 1 1 2, slot 1 has 2 0 none 1; 8 stands for no row.
    np.testing.assert_array_equal(groups.source, [[5, 8], [0, 1], [2, 7], [3, 4], [8, 8]])
    np.testing.assert_array_equal(groups.expert[:4], [0, 1, 1, 2])
    np.testing.assert_array_equal(groups.place, [[2, 3, 4, 6], [7, 0, 10, 5]])


def test_rows_of_a_block():
    # Half of an expert's 2048 / 32 rows; at most 64, at least 8; a power of two.
    assert [rows_of_block(2048, experts) for experts in (8, 32, 48, 512)] == [64, 32, 16, 8]
    # The most blocks: each of 32 experts leaves one of 31 rows unfilled. Of 4 rows, 4 at most.
    assert block_count(2048, 32, 32) == (2048 + 32 * 31) // 32
    assert block_count(4, 512, 8) == 4


@pytest.mark.parametrize("walk", ["loop", "batch"])
@pytest.mark.parametrize(
    "router", [{"name": "top_k"}, {"name": "switch", "capacity": 2, "overflow": "frozen"}]
)
def test_the_routed_ffn_in_groups_is_that_of_the_package(router, walk):
    rows, mlp, method = 3, llama_mlp(), mixlora(router)
    grouped = group_mixlora(method, walk, block=4)
    grouped_ffn, one_hot_ffn = (AdaptedFFN(mlp, adapter, rows) for adapter in (grouped, method))
    tree, x = one_hot_ffn.random_tree(), random_input(rows, 10)
    cotangent = 0.1 * _random(*x.shape)

    def step(ffn):
        def loss(tree, x):
            y, statistics = ffn(tree, x)
            return jnp.sum(y * cotangent), (y, statistics)

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(tree, x)

    (gradients, (y, statistics)), (expected, (expected_y, expected_statistics)) = (
        step(grouped_ffn),
        step(one_hot_ffn),
    )
    np.testing.assert_allclose(y, expected_y, **ROUNDING)
    compare = lambda leaf, other: np.testing.assert_allclose(leaf, other, **GRADIENT_ROUNDING)
    jax.tree.map(compare, gradients, expected)
    jax.tree.map(np.testing.assert_array_equal, statistics, expected_statistics)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    "overrides",
    [
        {"dora": True},
        {"dropout": 0.1},
        {"ffn_dropout": 0.1},
        {"target_modules": ("gate_proj", "up_proj")},
    ],
)
def test_unsupported_fields_of_the_grouped_form_are_refused(overrides):
    method = mixlora({"name": "top_k"}, **overrides)
    with pytest.raises(FieldError, match=next(iter(overrides))):
        group_mixlora(method)
