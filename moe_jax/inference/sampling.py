"""How the next token is picked from the logits: the likeliest one, or one drawn at random.

The filters and their order are those of transformers' `generate`: repetition penalty, temperature,
top-k, top-p, min-p. Each works on what the one before it has left.

Letters: B rows, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moe_jax.config.parse import require

NOT_FINITE = -1
"""What `next_token` gives for a row whose logits are not finite; no token has this id."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is picked.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token, and nothing is random.
      top_k: only so many of the likeliest tokens, and those as likely as the last of them, may be
        drawn; None is no limit.
      top_p: only the likeliest tokens whose probabilities together pass this may be drawn (nucleus
        sampling, arXiv:1904.09751); 1 is no limit.
      min_p: only tokens at least so many times as likely as the likeliest may be drawn
        (arXiv:2407.01082); 0 is no limit.
      repetition_penalty: divides the positive logits of tokens that stand in the prompt or the
        answer so far, and multiplies the negative ones (CTRL, arXiv:1909.05858, section 4.1);
        1 is none. It also works with temperature 0.

    Raises:
      ConfigError: a value is out of range, or would have no effect because nothing is drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for field in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, field)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            require(is_number, field, f"must be a number, got {value!r}")
        require(
            0 <= self.temperature < float("inf"),
            "temperature",
            f"must be 0 (the likeliest token) or positive, got {self.temperature}",
        )
        if self.top_k is not None:
            is_count = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
            require(
                is_count and self.top_k > 0,
                "top_k",
                f"must be a positive whole number, or None for no limit, got {self.top_k!r}",
            )
        require(0 < self.top_p <= 1, "top_p", f"must be above 0 and at most 1, got {self.top_p}")
        require(0 <= self.min_p <= 1, "min_p", f"must be between 0 and 1, got {self.min_p}")
        require(
            0 < self.repetition_penalty < float("inf"),
            "repetition_penalty",
            f"must be positive (1 is none), got {self.repetition_penalty}",
        )
        for field, neutral in (("top_k", None), ("top_p", 1), ("min_p", 0)):
            require(
                self.temperature > 0 or getattr(self, field) == neutral,
                field,
                "has no effect with temperature 0, which takes the likeliest token; give a "
                "temperature too, such as 1",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn at random."""
        return self.temperature == 0


def next_token(
    logits: jax.Array, seen: jax.Array, keys: jax.Array, config: SamplingConfig
) -> jax.Array:
    """Picks a token for each row; a row's depends on nothing but its own logits, `seen` and key.

    Args:
      logits: float32 [B, V].
      seen: bool [B, V], tokens in the row's prompt or answer so far.
      keys: random keys [B]; not read when greedy.
      config: static.

    Returns:
      int32 [B]; `NOT_FINITE` where a logit is NaN or positive infinity.
    """
    filtered = filtered_logits(logits, seen, config)
    if config.is_greedy:
        tokens = jnp.argmax(filtered, axis=-1)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, filtered)
    is_valid = (
        jnp.max(logits, axis=-1) < jnp.inf
    )  # a NaN anywhere is the maximum, and compares false
    return jnp.where(is_valid, tokens, NOT_FINITE).astype(jnp.int32)


def filtered_logits(logits: jax.Array, seen: jax.Array, config: SamplingConfig) -> jax.Array:
    """The logits of the distribution that is drawn from, float32 [B, V]; -inf at what may not be.

    Args: see `next_token`.
    """
    if config.repetition_penalty != 1:
        penalty = config.repetition_penalty
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(seen, penalised, logits)
    if config.is_greedy:
        return logits
    if config.temperature != 1:
        logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if config.top_p < 1:
        logits = jnp.where(_in_nucleus(logits, config.top_p), logits, -jnp.inf)
    if config.min_p > 0:
        probs = jax.nn.softmax(logits, axis=-1)
        is_unlikely = probs < config.min_p * jnp.max(probs, axis=-1, keepdims=True)
        logits = jnp.where(is_unlikely, -jnp.inf, logits)
    return logits


def _in_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Whether a token is among the likeliest ones that together pass `top_p`, bool [B, V].

    Of equally likely tokens at the edge, those with the larger ids are in, as in transformers.
    """
    order = jnp.argsort(logits, axis=-1)  # ascending; stable, so that ties go by id
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    is_in = jnp.cumsum(probs, axis=-1) > 1 - top_p
    is_in = is_in.at[:, -1].set(True)
    return jnp.take_along_axis(is_in, jnp.argsort(order, axis=-1), axis=-1)
