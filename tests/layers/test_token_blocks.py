"""How many tokens are computed at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.token_blocks import block_length, put_block, take_block


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
    assert block_length(count, width, jnp.dtype(dtype)) == tokens


def test_an_accelerator_takes_all_at_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert block_length(16384, 11008, jnp.dtype("bfloat16")) == 16384
    assert block_length(16384, 11008, jnp.dtype("bfloat16"), tokens=4096) == 4096


def test_blocks_are_put_where_they_were_taken():
    array = np.arange(24.0).reshape(2, 6, 2)
    taken = take_block({"a": array}, jnp.int32(1), 2, axis=1)["a"]
    np.testing.assert_array_equal(taken, array[:, 2:4])
    put = put_block({"a": array}, {"a": -taken}, jnp.int32(1), 2, axis=1)["a"]
    np.testing.assert_array_equal(put[:, 2:4], -array[:, 2:4])
    np.testing.assert_array_equal(put[:, [0, 1, 4, 5]], array[:, [0, 1, 4, 5]])
