"""Sizes of the engine: rows, their length, the queue and the cache."""

from typing import NamedTuple

from moe_jax.config.parse import require


class EngineLimits(NamedTuple):
    """Sizes of the engine.

    Attributes:
      max_rows: number of answers that are computed side by side.
      max_length: largest number of tokens of a prompt and its answer.
      max_queue: number of answers that may wait for a row.
      cache_tokens: number of tokens that the cache holds, of all rows together.
      block: positions of a block of the cache.
      chunks: numbers of tokens of a prompt that are computed at a time.
    """

    max_rows: int = 16
    max_length: int = 2048
    max_queue: int = 256
    cache_tokens: int = 8192
    block: int = 64
    chunks: tuple[int, ...] = (32, 128)

    def check(self) -> None:
        """Refuses sizes that do not fit.

        Raises:
          ConfigError: a size is not positive, or the cache is too small for one row.
        """
        for name in ("max_rows", "max_length", "max_queue", "cache_tokens"):
            value = getattr(self, name)
            require(value >= 1, name, f"must be positive, got {value}")
        require(
            self.cache_tokens >= self.max_length,
            "cache_tokens",
            f"{self.cache_tokens} tokens do not hold one row of `max_length` {self.max_length}; "
            "give at least that many",
        )
