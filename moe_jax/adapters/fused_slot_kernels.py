"""The GPU kernels of `moe_jax.adapters.fused_slots`, one program of each for a part of the arrays.

A program of the kernels over tokens has `TOKENS` tokens, in their sorted order, and some blocks of
`FEATURES` features. One of the kernel over experts has one block of features and the slots of one
expert. Arrays are references to the memory of the GPU, read and written at explicit indices; what
lies outside of them is masked. Letters are those of `moe_jax.adapters.mixlora`; R is padded.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from moe_jax.adapters.fused_slot_arrays import TOKENS, Arrays, Orders, Settings
from moe_jax.layers.dropout import mixed

FEATURES = 32
"""Features of a tile. With 64, four warps have too few registers on compute capability 9.0: the
kernel over tokens would keep 584 bytes a thread in memory, and with 32 it keeps 16."""


_Tiles = tuple[jax.Array, ...]


class _Slot(NamedTuple):
    """One slot of a tile's tokens.

    Attributes:
      number: c.
      experts: expert of each token, [t]; -1 for none.
      weights: [t].
      words: words of the tokens for dropout, [t].
      columns: its columns in arrays of codes, [R].
      first, end: range of its experts.
    """

    number: int
    experts: jax.Array
    weights: jax.Array
    words: jax.Array
    columns: jax.Array
    first: jax.Array
    end: jax.Array

    def sums(self, terms: Callable[[Any, jax.Array], _Tiles], start: _Tiles) -> _Tiles:
        """`start` plus `terms(e, is_expert [t, 1])` of each expert e of the slot."""

        def add(expert: Any, sums: _Tiles) -> _Tiles:
            added = terms(expert, (self.experts == expert)[:, None])
            return tuple(a + b for a, b in zip(sums, added, strict=True))

        return jax.lax.fori_loop(self.first, self.end, add, start)


class _Part(NamedTuple):
    """A part of [T, F] arrays: rows [t] and columns [f], and which of them exist."""

    rows: jax.Array
    columns: jax.Array
    has_row: jax.Array
    has_column: jax.Array

    def load(self, array: Any) -> jax.Array:
        """The tile [t, f] of an array, zero outside of it."""
        return plt.load(self._at(array), mask=self._mask(), other=0)

    def store(self, array: Any, tile: jax.Array) -> None:
        plt.store(self._at(array), tile.astype(array.dtype), mask=self._mask())

    def _at(self, array: Any) -> Any:
        return array.at[self.rows[:, None], self.columns[None, :]]

    def _mask(self) -> jax.Array:
        return self.has_row[:, None] & self.has_column[None, :]


def _all(size: int) -> jax.Array:
    return jnp.arange(size) >= 0


class _Block(NamedTuple):
    """A block of features, and the weights of an expert on it."""

    settings: Settings
    arrays: Arrays
    columns: jax.Array

    @property
    def inside(self) -> jax.Array:
        return self.columns < self.arrays.gate.shape[1]

    def of_tokens(self, rows: jax.Array, has_row: jax.Array) -> _Part:
        return _Part(rows, self.columns, has_row, self.inside)

    def wide(self, b: Any, expert: Any) -> jax.Array:
        """B of an expert, [R, f]."""
        ranks = self._ranks(expert)
        return _Part(ranks, self.columns, _all(len(ranks)), self.inside).load(b)

    def down(self, expert: Any) -> jax.Array:
        """A of an expert on the down projection, [f, R]."""
        return self.by_rank(expert).load(self.arrays.a_down)

    def drop(self, tile: jax.Array, orders: Orders, words: jax.Array, slot: Any) -> jax.Array:
        """Dropout of a tile [t, f] before `a_down`, or of its gradient.

        `words` [t] are those of the tokens, and `slot` is a number or one for each token.
        """
        if not self.settings.drops:
            return tile
        rows = jnp.zeros(words.shape, jnp.int32) + slot
        part = self.of_tokens(rows, _all(len(rows)))
        kept = mixed(words[:, None] + part.load(orders.feature_words)) >= orders.limit[0]
        return jnp.where(kept, tile * orders.gain[0], 0.0)

    def by_rank(self, expert: Any) -> _Part:
        """The part of an expert in arrays [F, E R]."""
        ranks = self._ranks(expert)
        return _Part(self.columns, ranks, self.inside, _all(len(ranks)))

    def _ranks(self, expert: Any) -> jax.Array:
        return expert * self.settings.rank + jnp.arange(self.settings.rank)


def forward_kernel(settings: Settings, *refs: Any) -> None:
    """Sum of the slots' hidden activations, and their codes on the down projection.

    Args:
      settings: static settings.
      *refs: `Arrays`, `Orders`; results: sum [T, F], and float32 codes [programs of a tile, T,
        C R].
    """
    arrays, orders, (total, z_down) = Arrays(*refs[:8]), Orders(*refs[8:16]), refs[16:]
    rows, has_row, slots = _tile_slots(settings, arrays, orders)
    codes = [_codes(s, rows, has_row, (arrays.z_gate, arrays.z_up)) for s in slots]
    first = pl.program_id(1) * settings.blocks

    def of_slot(
        block: _Block, slot: _Slot, codes: _Tiles, tiles: _Tiles, z: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def deltas(expert: Any, is_expert: jax.Array) -> _Tiles:
            z_gate, z_up = _selected(is_expert, codes)
            return (
                _dot(z_gate, block.wide(arrays.b_gate, expert)),
                _dot(z_up, block.wide(arrays.b_up, expert)),
            )

        gate, up = slot.sums(deltas, tiles)
        hidden = settings.activation(gate) * up * slot.weights[:, None]
        dropped = block.drop(hidden, orders, slot.words, slot.number).astype(arrays.gate.dtype)

        def down(expert: Any, is_expert: jax.Array) -> _Tiles:
            return (jnp.where(is_expert, _dot(dropped, block.down(expert)), 0.0),)

        return hidden, slot.sums(down, (z,))[0]

    def of_block(index: jax.Array, sums: _Tiles) -> _Tiles:
        block = _block(settings, arrays, first + index)
        part = block.of_tokens(rows, has_row)
        tiles = _float32(part, arrays.gate, arrays.up)
        results = [
            of_slot(block, slot, z, tiles, total)
            for slot, z, total in zip(slots, codes, sums, strict=True)
        ]
        part.store(total, functools.reduce(jnp.add, (hidden for hidden, _ in results)))
        return tuple(z for _, z in results)

    zeros = jnp.zeros((TOKENS, settings.rank), jnp.float32)
    sums = jax.lax.fori_loop(0, settings.blocks, of_block, (zeros,) * settings.slots)
    for slot, z in zip(slots, sums, strict=True):
        _store_codes(z_down, slot, rows, has_row, z)


def tokens_kernel(settings: Settings, *refs: Any) -> None:
    """Gradients of the frozen products, the codes and the weights.

    Args:
      settings: static settings.
      *refs: `Arrays`, `Orders`; gradients of the results of `forward_kernel`, the second as
        [T, C R]; results: gradients of gate and up, and float32 those of z_gate, z_up and weights,
        [programs of a tile, T, ...].
    """
    arrays, orders, (d_total, d_z_down) = Arrays(*refs[:8]), Orders(*refs[8:16]), refs[16:18]
    d_gate, d_up, d_z_gate, d_z_up, d_weights = refs[18:]
    rows, has_row, slots = _tile_slots(settings, arrays, orders)
    codes = [_codes(s, rows, has_row, (arrays.z_gate, arrays.z_up, d_z_down)) for s in slots]
    first = pl.program_id(1) * settings.blocks

    def of_slot(
        block: _Block, slot: _Slot, codes: _Tiles, tiles: _Tiles, sums: _Tiles
    ) -> tuple[_Tiles, _Tiles]:
        def deltas(expert: Any, is_expert: jax.Array) -> _Tiles:
            z_gate, z_up, d_z = _selected(is_expert, codes)
            return (
                _dot(z_gate, block.wide(arrays.b_gate, expert)),
                _dot(z_up, block.wide(arrays.b_up, expert)),
                _dot(d_z, block.down(expert), trans_b=True),
            )

        gate, up, d_sum = tiles
        gate, up, d_dropped = slot.sums(deltas, (gate, up, jnp.zeros_like(d_sum)))
        d_hidden = d_sum + block.drop(d_dropped, orders, slot.words, slot.number)
        value, slope = _activation(settings, gate)
        d_weight = jnp.sum(d_hidden * value * up, axis=1)
        d_hidden = d_hidden * slot.weights[:, None]
        wide = d_hidden * up * slope, d_hidden * value
        rounded = [tile.astype(arrays.gate.dtype) for tile in wide]

        def narrow(expert: Any, is_expert: jax.Array) -> _Tiles:
            return tuple(
                jnp.where(is_expert, _dot(tile, block.wide(b, expert), trans_b=True), 0.0)
                for tile, b in zip(rounded, (arrays.b_gate, arrays.b_up), strict=True)
            )

        return wide, (*slot.sums(narrow, sums[:2]), sums[2] + d_weight)

    def of_block(index: jax.Array, sums: tuple[_Tiles, ...]) -> tuple[_Tiles, ...]:
        block = _block(settings, arrays, first + index)
        part = block.of_tokens(rows, has_row)
        tiles = _float32(part, arrays.gate, arrays.up, d_total)
        results = [
            of_slot(block, slot, z, tiles, total)
            for slot, z, total in zip(slots, codes, sums, strict=True)
        ]
        for ref, number in ((d_gate, 0), (d_up, 1)):
            part.store(ref, functools.reduce(jnp.add, (wide[number] for wide, _ in results)))
        return tuple(narrow for _, narrow in results)

    zeros = jnp.zeros((TOKENS, settings.rank), jnp.float32)
    start = (zeros, zeros, jnp.zeros((TOKENS,), jnp.float32))
    sums = jax.lax.fori_loop(0, settings.blocks, of_block, (start,) * settings.slots)
    for slot, (z_gate, z_up, weight) in zip(slots, sums, strict=True):
        _store_codes(d_z_gate, slot, rows, has_row, z_gate)
        _store_codes(d_z_up, slot, rows, has_row, z_up)
        plt.store(d_weights.at[pl.program_id(1), rows, slot.number], weight, mask=has_row)


def experts_kernel(settings: Settings, *refs: Any) -> None:
    """Gradients of the pairs.

    Args:
      settings: static settings.
      *refs: `Arrays`, `Orders`; gradients of the results of `forward_kernel`, the second as
        [T, C R]; results: float32 gradients of b_gate and b_up, transposed, and of a_down,
        [F, E R].
    """
    arrays, orders = Arrays(*refs[:8]), Orders(*refs[8:16])
    d_total, d_z_down, *results = refs[16:]
    expert = pl.program_id(1)
    start, end = orders.starts[expert], orders.starts[expert + 1]
    block = _block(settings, arrays, pl.program_id(0))
    b_gate, b_up = (block.wide(b, expert) for b in (arrays.b_gate, arrays.b_up))
    a_down, ranks = block.down(expert), jnp.arange(settings.rank)

    def of_slots(index: jax.Array, sums: _Tiles) -> _Tiles:
        positions = start + index * TOKENS + jnp.arange(TOKENS)
        valid = positions < end
        slots = plt.load(orders.slots.at[positions], mask=valid, other=0)
        rows, number = slots // settings.slots, slots % settings.slots
        gate, up, d_sum = _float32(block.of_tokens(rows, valid), arrays.gate, arrays.up, d_total)
        columns = number[:, None] * settings.rank + ranks[None, :]
        mask = valid[:, None] & _all(settings.rank)[None, :]
        z_gate, z_up, d_z = (
            plt.load(ref.at[rows[:, None], columns], mask=mask, other=0)
            for ref in (arrays.z_gate, arrays.z_up, d_z_down)
        )
        weights = plt.load(arrays.weights.at[rows, number], mask=valid, other=0)[:, None]
        gate, up = gate + _dot(z_gate, b_gate), up + _dot(z_up, b_up)
        words = _words(settings, orders, rows, number, valid)
        drop = lambda tile: block.drop(tile, orders, words, number)
        d_hidden = (d_sum + drop(_dot(d_z, a_down, trans_b=True))) * weights
        value, slope = _activation(settings, gate)
        wide = (d_hidden * up * slope, d_hidden * value, drop(value * up * weights))
        return tuple(
            total + _dot(tile.astype(z.dtype), z, trans_a=True)
            for total, tile, z in zip(sums, wide, (z_gate, z_up, d_z), strict=True)
        )

    zeros = jnp.zeros((FEATURES, settings.rank), jnp.float32)
    sums = jax.lax.fori_loop(0, pl.cdiv(end - start, TOKENS), of_slots, (zeros,) * 3)
    for ref, total in zip(results, sums, strict=True):
        block.by_rank(expert).store(ref, total)


def _tile_slots(
    settings: Settings, arrays: Arrays, orders: Orders
) -> tuple[jax.Array, jax.Array, list[_Slot]]:
    """Numbers of the tokens of this program [t], which of them exist, and their slots."""
    rows = orders.tokens[pl.ds(pl.program_id(0) * TOKENS, TOKENS)]
    has_row = rows < arrays.gate.shape[0]
    slots = []
    for c in range(settings.slots):
        chosen = plt.load(orders.experts.at[rows, c], mask=has_row, other=-1)
        words = _words(settings, orders, rows, c, has_row)
        weights = plt.load(arrays.weights.at[rows, c], mask=has_row, other=0)
        first = jnp.min(jnp.where(chosen < 0, settings.experts, chosen))
        columns = c * settings.rank + jnp.arange(settings.rank)
        slots.append(_Slot(c, chosen, weights, words, columns, first, jnp.max(chosen) + 1))
    return rows, has_row, slots


def _words(settings: Settings, orders: Orders, rows: jax.Array, slot: Any, mask: Any) -> jax.Array:
    """Words of tokens for dropout [t]; without dropout they are not in memory."""
    if not settings.drops:
        return jnp.zeros(rows.shape, jnp.uint32)
    return plt.load(orders.token_words.at[rows, slot], mask=mask, other=0)


def _block(settings: Settings, arrays: Arrays, number: Any) -> _Block:
    return _Block(settings, arrays, number * FEATURES + jnp.arange(FEATURES))


def _float32(part: _Part, *arrays: Any) -> _Tiles:
    return tuple(part.load(array).astype(jnp.float32) for array in arrays)


def _codes(slot: _Slot, rows: jax.Array, has_row: jax.Array, arrays: Any) -> _Tiles:
    """The slot's codes [t, R] in arrays [T, C R]."""
    part = _Part(rows, slot.columns, has_row, _all(len(slot.columns)))
    return tuple(part.load(array) for array in arrays)


def _store_codes(
    array: Any, slot: _Slot, rows: jax.Array, has_row: jax.Array, codes: jax.Array
) -> None:
    """Stores the slot's codes [t, R] in this program's part of [programs of a tile, T, C R]."""
    index = (pl.program_id(1), rows[:, None], slot.columns[None, :])
    mask = has_row[:, None] & _all(len(slot.columns))[None, :]
    plt.store(array.at[index], codes, mask=mask)


def _selected(is_expert: jax.Array, codes: _Tiles) -> _Tiles:
    return tuple(jnp.where(is_expert, z, jnp.zeros_like(z)) for z in codes)


def _activation(settings: Settings, gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The activation function of the gate and its derivative."""
    return jax.jvp(settings.activation, (gate,), (jnp.ones_like(gate),))


def _dot(a: jax.Array, b: jax.Array, *, trans_a: bool = False, trans_b: bool = False) -> jax.Array:
    """Product of two tiles in float32; float32 operands are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )
