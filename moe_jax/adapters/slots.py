"""What a slot of MixLoRA makes of the frozen products of gate and up."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from moe_jax.adapters.low_rank import Pairs
from moe_jax.layers.activation import gated


@flax.struct.dataclass
class SlotTokens:
    """What differs from token to token.

    Attributes:
      products: of gate and up, by projection, [B, S, F].
      codes: of those that are targeted, by projection, [B, S, E, R].
      weights: [B, S, C], of the slots.
      dispatch: [B, S, C, E], or None; see `Routing`.
    """

    products: dict[str, jax.Array]
    codes: dict[str, jax.Array]
    weights: jax.Array
    dispatch: jax.Array | None


@flax.struct.dataclass
class SlotWeights:
    """What all tokens share.

    Attributes:
      biases: of gate and up, by projection; [F], or None.
      pairs: of those that are targeted, by projection.
      down: of the down projection; None if it is not targeted.
    """

    biases: dict[str, jax.Array | None]
    pairs: dict[str, Pairs]
    down: Pairs | None


class SlotDropout(NamedTuple):
    """What dropout keeps, a bool [B, S, F] for each slot; None where nothing is dropped.

    Attributes:
      hidden: of the expert's hidden activation.
      down_input: of that, what the pair of the down projection sees.
    """

    hidden: Sequence[jax.Array] | None
    down_input: Sequence[jax.Array] | None


class Slot(NamedTuple):
    """One slot, as `in_turn` calls it.

    Attributes:
      activation: of the gate.
      hidden_rate, down_rate: the shares that dropout drops.
    """

    activation: Callable[[jax.Array], jax.Array]
    hidden_rate: float
    down_rate: float

    def __call__(
        self, place: int, tokens: SlotTokens, shared: SlotWeights, dropout: SlotDropout
    ) -> tuple[jax.Array, jax.Array | None]:
        """The slot's weighted hidden activation, and its codes for the down projection.

        Returns:
          [B, S, F], and without the weight [B, S, R] where slot c is expert c, [B, S, E, R], at the
          expert's place, where it is one of the router's choice, and None where the down projection
          is not targeted.
        """
        gate = _adapted("gate_proj", place, tokens, shared)
        hidden = gated(self.activation, gate, _adapted("up_proj", place, tokens, shared))
        if dropout.hidden is not None:
            hidden = _dropped(hidden, dropout.hidden[place], self.hidden_rate)
        weighted = tokens.weights[..., place, None] * hidden
        if shared.down is None:
            return weighted, None
        if dropout.down_input is not None:
            hidden = _dropped(hidden, dropout.down_input[place], self.down_rate)
        if tokens.dispatch is None:
            return weighted, shared.down.expert_codes(hidden, place)
        select = tokens.dispatch[..., place, :].astype(hidden.dtype)
        return weighted, shared.down.codes(hidden) * select[..., None]


def adapt_slot(
    pairs: Pairs,
    dispatch: jax.Array | None,
    place: int,
    product: jax.Array,
    codes: jax.Array,
) -> jax.Array:
    """A frozen product [B, S, out] as the expert in the slot `place` changes it.

    Args:
      pairs: of the projection.
      dispatch: [B, S, C, E], or None; see `Routing`.
      place: the slot's.
      product: without a bias.
      codes: [B, S, E, R].
    """
    if dispatch is None:
        return pairs.adapt_expert(product, codes, place)
    return pairs.adapt(product, codes, dispatch[..., place, :])


def _adapted(target: str, place: int, tokens: SlotTokens, shared: SlotWeights) -> jax.Array:
    product, bias = tokens.products[target], shared.biases[target]
    if target in shared.pairs:
        codes = tokens.codes[target]
        product = adapt_slot(shared.pairs[target], tokens.dispatch, place, product, codes)
    return product if bias is None else product + bias


def _dropped(hidden: jax.Array, kept: jax.Array, rate: float) -> jax.Array:
    return jnp.where(kept, hidden / (1.0 - rate), jnp.zeros_like(hidden))
