"""Attention over a cache in blocks, compared with a plain softmax over each row's tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import ROUNDING

from moe_jax.layers.block_cache import (
    SPARE_BLOCK,
    BlockPool,
    BlockPosition,
    block_attention,
    write_blocks,
)

LAYERS, BLOCKS, KV, BLOCK, WIDTH, HEADS = 2, 9, 2, 4, 8, 6
LENGTHS = (0, 3, 4, 11)
TABLES = ((0, 0, 0, 0), (5, 0, 0, 0), (2, 8, 0, 0), (7, 1, 3, 4))
OPTIONS = {
    "plain": {"scale": 0.3},
    "window": {"scale": 0.3, "window": 5},
    "capped": {"scale": 1.0, "softcap": 2.0},
    "not sliding": {"scale": 0.3, "window": 5, "slides": jnp.bool_(False)},
}


def random(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module", params=[1, 2, 4])
def position(request):
    """The rows, with tables in groups of one, two or four blocks."""
    shape = (LAYERS, BLOCKS, KV, BLOCK, WIDTH)
    pool = BlockPool(jnp.asarray(random(*shape, seed=0)), jnp.asarray(random(*shape, seed=1)))
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    tables = jnp.asarray(TABLES, jnp.int32).reshape(len(TABLES), -1, request.param)
    return BlockPosition(pool, tables, lengths, lengths)


def by_hand(position, layer, row, query, key, value, *, scale, window=None, softcap=None, **_):
    """Attention of one row's new tokens [S, H, Q], one query after another."""
    length = LENGTHS[row]
    earlier = [
        np.concatenate([part[layer, block].transpose(1, 0, 2) for block in TABLES[row]])[:length]
        for part in map(np.asarray, position.pool)
    ]
    keys, values = (np.concatenate(pair) for pair in zip(earlier, (key, value), strict=True))
    result = np.zeros_like(query)
    for place, heads in enumerate(query):
        stop = length + place + 1
        start = 0 if window is None else max(0, stop - window)
        for head, vector in enumerate(heads):
            group = head * KV // HEADS
            scores = keys[start:stop, group] @ vector * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            result[place, head] = weights / weights.sum() @ values[start:stop, group]
    return result


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (5, 2, 0, 3)])
def test_attention(position, name, counts):
    options, width = OPTIONS[name], max(counts)
    query = random(4, width, HEADS, WIDTH, seed=2)
    key, value = (random(4, width, KV, WIDTH, seed=seed) for seed in (3, 4))
    mask = np.arange(width)[None] < np.array(counts)[:, None]
    slides = options.get("slides", True)
    expected = {k: v for k, v in options.items() if k != "window" or slides}
    for layer in range(LAYERS):
        actual = jax.jit(lambda *a, layer=layer: block_attention(*a, jnp.int32(layer), **options))(
            *map(jnp.asarray, (query, key, value, mask)), position
        )
        assert np.isfinite(actual).all()
        for row, count in enumerate(counts):
            own = (array[row, :count] for array in (query, key, value))
            plain = by_hand(position, layer, row, *own, **expected)
            np.testing.assert_allclose(actual[row, :count], plain, **ROUNDING)


def test_what_is_not_finite_stays_in_its_row(position):
    """NaN of a row that is gone: in the spare block, after the end of a row, and in padding."""
    spoilt = np.array(position.pool)
    spoilt[:, :, SPARE_BLOCK] = np.nan
    for table, length in zip(TABLES, LENGTHS, strict=True):
        for place in range(length, -(-length // BLOCK) * BLOCK):
            spoilt[:, :, table[place // BLOCK], :, place % BLOCK] = np.nan
    mask = np.arange(3)[None] < np.array((3, 1, 2, 3))[:, None]
    query, *own = (
        np.where(mask[..., None, None], random(4, 3, heads, WIDTH, seed=heads), np.nan)
        for heads in (HEADS, KV, KV)
    )
    after = position._replace(pool=BlockPool(*map(jnp.asarray, spoilt)))
    actual = block_attention(*map(jnp.asarray, (query, *own, mask)), after, jnp.int32(1), scale=0.3)
    clean = (np.nan_to_num(array) for array in (query, *own))
    expected = block_attention(*map(jnp.asarray, (*clean, mask)), position, jnp.int32(1), scale=0.3)
    np.testing.assert_array_equal(actual[mask], expected[mask])


@pytest.mark.parametrize("slides", [None, True])
@pytest.mark.parametrize("position", [1, 2], indirect=True)
def test_blocks_before_the_window_are_not_read(position, slides):
    """The row of 11 tokens with a window of 3 begins in its third block; the other is padding."""
    spoilt = np.array(position.pool)
    spoilt[:, :, TABLES[3][:2]] = np.nan
    row = np.array([0, 3])
    query = random(2, 2, HEADS, WIDTH, seed=2)
    key, value = (random(2, 2, KV, WIDTH, seed=seed) for seed in (3, 4))
    after = BlockPosition(
        BlockPool(*map(jnp.asarray, spoilt)), *(array[row] for array in position[1:])
    )
    given = (query, key, value, np.array([[False] * 2, [True] * 2]))
    slides = None if slides is None else jnp.bool_(slides)
    options = {"scale": 0.3, "window": 3, "slides": slides}
    actual = block_attention(*map(jnp.asarray, given), after, jnp.int32(1), **options)
    plain = by_hand(position, 1, 3, query[1], key[1], value[1], scale=0.3, window=3)
    np.testing.assert_allclose(actual[1], plain, **ROUNDING)


def test_new_tokens_are_written_to_their_rows_blocks(position):
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0] * 5, [1, 1, 1, 0, 0]], bool)
    tables = jnp.asarray(((6, 4, 0, 0), (5, 0, 0, 0), (2, 8, 0, 0), (7, 1, 3, 4)), jnp.int32)
    tables = tables.at[1, 1].set(3).at[3].set(jnp.asarray((7, 1, 2, 8), jnp.int32))
    grouped = tables.reshape(position.tables.shape)
    update = BlockPool(
        *(jnp.asarray(random(LAYERS, 4, KV, 5, WIDTH, seed=seed)) for seed in (5, 6))
    )
    written = write_blocks(position.pool, update, grouped, position.lengths, jnp.asarray(mask))
    for part, before, new in zip(written, position.pool, update, strict=True):
        expected = np.array(before)
        for row, length in enumerate(LENGTHS):
            for place in np.flatnonzero(mask[row]):
                block, offset = divmod(length + place, BLOCK)
                expected[:, tables[row, block], :, offset] = new[:, row, :, place]
        others = [block for block in range(BLOCKS) if block != SPARE_BLOCK]
        np.testing.assert_array_equal(part[:, others], expected[:, others])
