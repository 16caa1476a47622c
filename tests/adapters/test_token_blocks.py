"""Functions of tokens computed in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tolerances import ROUNDING

from moe_jax.adapters.token_blocks import block_length, cpu_block_tokens, map_token_blocks


@pytest.mark.parametrize(
    ("count", "width", "dtype", "tokens"),
    [
        (1024, 1376, "float32", 128),  # 2**20 / (4 * 1376) = 190 tokens
        (1024, 1376, "bfloat16", 256),  # 381 tokens
        (512, 11008, "float32", 64),  # 23 tokens would fit; never fewer than 64
        (64, 64, "float32", 64),  # all fit
        (1021, 1376, "float32", 1021),  # a prime number of tokens: not one by one
        (368, 1376, "float32", 184),
    ],
)
def test_blocks_fit_the_cache_of_a_cpu(count, width, dtype, tokens):
    assert block_length(count, cpu_block_tokens(width, dtype)) == tokens


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("block", [2, 3, 24])
def test_blocks_compute_what_all_tokens_at_once_do(block, shards):
    rng = np.random.default_rng(0)
    tokens = {"x": jnp.asarray(rng.standard_normal((24, 3)), jnp.float32), "i": jnp.arange(24)}
    matrix = jnp.asarray(rng.standard_normal((3, 5)), jnp.float32)

    def function(tokens, matrix):
        return {"y": jnp.tanh(tokens["x"] @ matrix), "i": tokens["i"]}

    def loss(x, matrix, run):
        outputs = run({**tokens, "x": x}, matrix)
        return jnp.sum(outputs["y"] * outputs["i"][:, None]), outputs

    blocked = lambda tokens, matrix: map_token_blocks(function, tokens, matrix, block, shards)
    results = [
        jax.grad(loss, argnums=(0, 1), has_aux=True)(tokens["x"], matrix, run)
        for run in (function, blocked)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), *results)
    np.testing.assert_array_equal(results[1][1]["i"], np.arange(24))


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        ({"remat": "frozen"}, 2**20 // (4 * 80)),
        ({"remat": "frozen", "dtype": "bfloat16"}, 2**20 // (2 * 80)),
        ({"remat": "frozen", "block_tokens": 16}, 16),
        ({"remat": "dots"}, None),  # keeps what blocks would compute again
        ({"remat": "none"}, None),
    ],
    ids=str,
)
def test_a_program_for_a_cpu_has_blocks_unless_activations_are_kept(compute, expected):
    program = tiny_program.program({"a": tiny_program.MIXLORA}, compute=compute)
    assert program.model.compute.block_tokens == expected
