"""Memory and dropout of expert slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from adapted_ffn import AdaptedFFN, llama_mlp, mixlora, random_input
from tolerances import ROUNDING

ROWS, LENGTH, WIDTH = 2, 64, 2048
HIDDEN_BYTES = ROWS * LENGTH * WIDTH * 4


def _temporary_bytes(method, dropout_key=None):
    mlp = llama_mlp()
    narrow = mlp.gate_proj.in_features
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(narrow, WIDTH, bias=False))
    mlp.down_proj = torch.nn.Linear(WIDTH, narrow, bias=False)
    ours, x = AdaptedFFN(mlp, method, ROWS), random_input(ROWS, LENGTH)

    def total(tree, x):
        return jnp.sum(ours(tree, x, dropout_key=dropout_key)[0])

    step = jax.jit(jax.grad(total, argnums=(0, 1)))
    return step.lower(ours.random_tree(), x).compile().memory_analysis().temp_size_in_bytes


SOFT = {"router": {"name": "soft"}}


@pytest.mark.parametrize(
    ("few", "many", "dropout_key"),
    [
        ({**SOFT, "num_experts": 4}, {**SOFT, "num_experts": 16}, None),
        (
            {"router": {"name": "top_k", "top_k": 3}, "num_experts": 16},
            {"router": {"name": "top_k", "top_k": 12}, "num_experts": 16},
            None,
        ),
        (
            # Masks of a byte an entry would be three more arrays of that size.
            {**SOFT, "num_experts": 4, "ffn_dropout": 0.5},
            {**SOFT, "num_experts": 16, "ffn_dropout": 0.5},
            jax.random.key(0),
        ),
    ],
    ids=["experts", "chosen", "dropout"],
)
def test_memory_of_hidden_activations_does_not_grow_with_the_slots(few, many, dropout_key):
    few, many = (_temporary_bytes(mixlora(**fields), dropout_key) for fields in (few, many))
    # They differ by codes and by gradients of the experts' own weights.
    assert many - few < 1.5 * HIDDEN_BYTES


def test_memory_with_dora_on_the_down_projection_is_linear_in_the_slots():
    """DoRA rescales each expert's output, so that slots cannot be summed before the projection."""
    few, many = (_temporary_bytes(mixlora(**SOFT, num_experts=n, dora=True)) for n in (4, 16))
    # Of each one more: the activation and its gradient, its three projections' codes, and gradients
    # of its own weights.
    assert many - few < 12 * 4 * HIDDEN_BYTES


def test_a_layer_that_is_not_routed_drops_nothing():
    router = {"name": "switch", "capacity": 40, "sparse_step": 2}  # leaves layer 0 as it is
    mlp, x = llama_mlp(), random_input(ROWS, 20)
    ours = AdaptedFFN(mlp, mixlora(router, ffn_dropout=0.5, dropout=0.5), ROWS)
    y, _ = jax.jit(ours)(ours.random_tree(), x, dropout_key=jax.random.key(0))
    np.testing.assert_allclose(y, mlp(torch.tensor(np.asarray(x)).double()), **ROUNDING)


@pytest.mark.parametrize("longer", [1.0, 100.0])
def test_expert_slots_keep_the_precision_of_bfloat16(longer):
    """However much larger one expert's change is than the frozen product, and than another's."""
    mlp, method = llama_mlp(), mixlora({"name": "top_k", "top_k": 2})
    x = random_input(ROWS, LENGTH).astype(jnp.bfloat16)
    tree = AdaptedFFN(mlp, method, ROWS).random_tree()
    for target in ("gate_proj", "up_proj"):
        tree[target]["lora_B"] = tree[target]["lora_B"].at[0].multiply(longer)
    exact, ours = (
        np.asarray(AdaptedFFN(mlp, method, ROWS, dtype)(tree, x.astype(dtype))[0], np.float32)
        for dtype in ("float32", "bfloat16")
    )
    error = np.abs(ours - exact).max(axis=-1) / np.abs(exact).max(axis=-1)
    # A rounding is 2^-8 at most; here some eight follow each other.
    assert np.median(error) < 3 * 2**-8
