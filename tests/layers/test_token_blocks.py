"""How many positions are computed at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.token_blocks import block_length, put_block, take_block


@pytest.mark.parametrize(
    ("rows", "length", "width", "dtype", "positions"),
    [
        (8, 128, 1376, "float32", 16),  # 2**20 / (4 * 1376) = 190 tokens, 23 positions of 8 rows
        (8, 128, 1376, "bfloat16", 32),  # 381 tokens, 47 positions
        (1, 512, 11008, "float32", 64),  # 23 tokens would fit; never fewer than 64
        (256, 64, 11008, "float32", 1),  # one position of all rows
        (2, 32, 64, "float32", 32),  # all fit
        (8, 127, 1376, "float32", 127),  # a prime number of positions: not one by one
        (8, 46, 1376, "float32", 23),
    ],
)
def test_blocks_fit_the_cache_of_a_cpu(rows, length, width, dtype, positions):
    assert block_length(rows, length, width, jnp.dtype(dtype)) == positions


def test_an_accelerator_takes_all_at_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert block_length(8, 2048, 11008, jnp.dtype("bfloat16")) == 2048
    assert block_length(8, 2048, 11008, jnp.dtype("bfloat16"), tokens=4096) == 512


def test_blocks_are_put_where_they_were_taken():
    array = np.arange(24.0).reshape(2, 6, 2)
    taken = take_block({"a": array}, jnp.int32(1), 2)["a"]
    np.testing.assert_array_equal(taken, array[:, 2:4])
    put = put_block({"a": array}, {"a": -taken}, jnp.int32(1), 2)["a"]
    np.testing.assert_array_equal(put[:, 2:4], -array[:, 2:4])
    np.testing.assert_array_equal(put[:, [0, 1, 4, 5]], array[:, [0, 1, 4, 5]])
