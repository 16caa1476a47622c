"""The tokens of a batch along one axis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class TokenAxes(NamedTuple):
    """How the axes [B, S] of a batch become one.

    Where devices, or groups of them, divide the rows between them, they keep an axis in front, so
    that a part of the tokens is a part of each device's: two axes [shards, B S / shards].

    Attributes:
      rows: B.
      length: S.
      shards: so many; a divisor of B.
    """

    rows: int
    length: int
    shards: int = 1

    @property
    def per_shard(self) -> int:
        """Tokens of a device."""
        return self.rows // self.shards * self.length

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tokens: [T], or [shards, T]."""
        return (self.per_shard,) if self.shards == 1 else (self.shards, self.per_shard)

    @property
    def numbers(self) -> jax.Array:
        """The tokens counted through, int32."""
        return jnp.arange(self.rows * self.length, dtype=jnp.int32).reshape(self.shape)

    def join(self, tree: Any, before: int = 0) -> Any:
        """Arrays with `before` axes in front of [B, S], those two then being tokens."""
        return jax.tree.map(
            lambda array: array.reshape(
                *array.shape[:before], *self.shape, *array.shape[before + 2 :]
            ),
            tree,
        )

    def part(self, tree: Any, before: int = 0) -> Any:
        """Arrays with `before` axes in front of the tokens, those then being [B, S] again."""
        return jax.tree.map(
            lambda array: array.reshape(
                *array.shape[:before],
                self.rows,
                self.length,
                *array.shape[before + len(self.shape) :],
            ),
            tree,
        )
