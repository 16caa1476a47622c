"""What a slot of MixLoRA makes of the frozen products of gate and up."""

from collections.abc import Callable
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.in_turn import Operands
from moe_jax.adapters.lora.low_rank import LoraA, LoraB
from moe_jax.layers.activation import gated
from moe_jax.layers.names import WIDE_PRODUCT
from moe_jax.layers.token_axes import TokenAxes


@flax.struct.dataclass
class SlotTokens:
    """What all slots know of a token. T is one axis or two.

    Attributes:
      products: of gate and up, by projection, [T, F], without a bias: what the first slot has made
        of them where slots are chosen and there is no DoRA, the frozen ones otherwise.
      codes: of the projections that are adapted, [T, E, R]; none where slot c is expert c.
      first: the first slot's dispatch [T, E] where it has made the products.
    """

    products: dict[str, jax.Array]
    codes: dict[str, jax.Array]
    first: jax.Array | None


@flax.struct.dataclass
class OwnTokens:
    """What one slot knows of a token.

    Attributes:
      weights: [T], the slot's share of the output.
      dispatch: [T, E], one-hot or all zeros; None where the slot is an expert.
      codes: where it is, that expert's, by projection, [T, 1, R].
    """

    weights: jax.Array
    dispatch: jax.Array | None
    codes: dict[str, jax.Array]


@flax.struct.dataclass
class SlotWeights:
    """The low-rank pairs, of all experts, or of the one that a slot is.

    Attributes:
      expand: of gate and up, by projection, of those that are adapted.
      down: of the down projection; None if it is not adapted.
    """

    expand: dict[str, LoraB]
    down: LoraA | None


@flax.struct.dataclass
class SlotConstants:
    """What needs no gradient.

    Attributes:
      biases: of gate and up, by projection; [F], or None.
      dropout: a key for each slot; None where nothing is dropped.
      routed: bool [], whether the layer is; in one that is not, the FFN is frozen and drops
        nothing. None where all layers are.
    """

    biases: dict[str, jax.Array | None]
    dropout: jax.Array | None
    routed: jax.Array | None


class SlotInputs(NamedTuple):
    """What the slots are made from, over rows [B, S].

    Attributes:
      products: the frozen ones of gate and up, by projection, [B, S, F], without a bias.
      biases: theirs, [F], or None.
      expand: the B of those that are adapted, by projection.
      codes: for them, [B, S, E, R].
      down: the A of the down projection; None if it is not adapted.
      dispatch: [B, S, C, E], or None; see `Routing`.
      weights: [B, S, C].
      dropout: a key for each slot; None where nothing is dropped.
      routed: see `SlotConstants`.
    """

    products: dict[str, jax.Array]
    biases: dict[str, jax.Array | None]
    expand: dict[str, LoraB]
    codes: dict[str, jax.Array]
    down: LoraA | None
    dispatch: jax.Array | None
    weights: jax.Array
    dropout: jax.Array | None
    routed: jax.Array | None

    def operands(self, axes: TokenAxes) -> Operands:
        """For `in_turn`, with [B, S] as `axes` has them. No gradient goes to the dispatch."""
        weights = jnp.moveaxis(self.weights, -1, 0)
        constants = SlotConstants(self.biases, self.dropout, self.routed)
        if self.dispatch is None:
            codes = {t: jnp.moveaxis(z, -2, 0)[..., None, :] for t, z in self.codes.items()}
            tokens, own = SlotTokens(self.products, {}, None), OwnTokens(weights, None, codes)
            expand = {target: lora_b.of_each() for target, lora_b in self.expand.items()}
            shared = None
            of_each = SlotWeights(expand, None if self.down is None else self.down.of_each())
        else:
            dispatch = jax.lax.stop_gradient(jnp.moveaxis(self.dispatch, -2, 0))
            own, tokens = OwnTokens(weights, dispatch, {}), self._chosen_tokens(dispatch[0])
            shared, of_each = SlotWeights(self.expand, self.down), None
        return Operands(
            axes.numbers, axes.join(tokens), axes.join(own, 1), shared, of_each, constants
        )

    def _chosen_tokens(self, first: jax.Array) -> SlotTokens:
        """What chosen slots start from.

        Without DoRA the first slot's products serve the others too, which differ from them by codes
        alone: kept for the backward pass in place of the frozen products, they save the first
        slot's there. A later slot without an expert is the frozen FFN but for rounding.
        """
        if any(lora_b.gains is not None for lora_b in self.expand.values()):
            return SlotTokens(self.products, self.codes, None)
        products = dict(self.products)
        for target, lora_b in self.expand.items():
            adapted = lora_b.adapt(products[target], self.codes[target], first)
            products[target] = checkpoint_name(adapted, WIDE_PRODUCT)
        return SlotTokens(products, self.codes, first)


class SlotResult(NamedTuple):
    """What slots make for the down projection; None where there is nothing.

    Attributes:
      hidden: the weighted hidden activation, [T, F].
      codes: its codes, [T, E, R] at the expert's place, or [T, 1, R] of the expert that a slot is.
    """

    hidden: jax.Array | None = None
    codes: jax.Array | None = None


class Slot(NamedTuple):
    """One slot, as `in_turn` calls it.

    Attributes:
      activation: of the gate.
      hidden_rate: share of the hidden activation that is dropped.
      down_rate: share of it that the pair of the down projection does not see.
      summed: whether anything is added up over the slots.
    """

    activation: Callable[[jax.Array], jax.Array]
    hidden_rate: float
    down_rate: float
    summed: bool

    def __call__(self, place: int | jax.Array, operands: Operands) -> tuple[SlotResult, SlotResult]:
        """What is added up over the slots, and what stays the slot's own.

        Hidden activations are added up, and so are codes, unless slots are experts.
        """
        own: OwnTokens = operands.own_tokens
        weights: SlotWeights = operands.weights
        if operands.own_weights is not None:
            weights = operands.own_weights
        gate, up = (
            self._adapted(target, place, operands, weights) for target in ("gate_proj", "up_proj")
        )
        # Weighted before the codes are made, so that the weight's gradient needs none of them.
        hidden = gated(self.activation, gate, up, own.weights[..., None])
        hidden = self._dropped(hidden, self.hidden_rate, 0, place, operands)
        codes = None
        if weights.down is not None:
            seen = self._dropped(hidden, self.down_rate, 1, place, operands)
            codes = weights.down.codes(seen)
            if own.dispatch is not None:
                select = own.dispatch.astype(codes.dtype)
                codes = codes * select[..., None]
        if not self.summed:
            return SlotResult(), SlotResult(hidden, codes)
        if own.dispatch is None:
            return SlotResult(hidden), SlotResult(codes=codes)
        return SlotResult(hidden, codes), SlotResult()

    def _adapted(
        self, target: str, place: int | jax.Array, operands: Operands, weights: SlotWeights
    ) -> jax.Array:
        tokens: SlotTokens = operands.tokens
        own: OwnTokens = operands.own_tokens
        product, bias = tokens.products[target], operands.constants.biases[target]
        if target in weights.expand:
            expand = weights.expand[target]
            if own.dispatch is None:
                product = expand.adapt(product, own.codes[target], None)
            elif tokens.first is None:
                product = expand.adapt(product, tokens.codes[target], own.dispatch)
            elif not isinstance(place, int) or place > 0:
                change = own.dispatch - tokens.first
                product = expand.adapt(product, tokens.codes[target], change)
        return product if bias is None else product + bias

    def _dropped(
        self,
        hidden: jax.Array,
        rate: float,
        purpose: int,
        place: int | jax.Array,
        operands: Operands,
    ) -> jax.Array:
        keys = operands.constants.dropout
        if keys is None or not rate:
            return hidden
        assert operands.numbers is not None
        dropped = drop(hidden, rate, jax.random.fold_in(keys[place], purpose), operands.numbers)
        routed = operands.constants.routed
        return dropped if routed is None else jnp.where(routed, dropped, hidden)


def drop(x: jax.Array, rate: float, key: jax.Array, numbers: jax.Array) -> jax.Array:
    """Dropout that treats a token alike in whatever block it comes.

    Args:
      x: [T, F].
      rate: share of entries that become zero; the others are divided by what is left of one.
      key: of all tokens.
      numbers: int32 [T]; a token's mask depends on its number alone.
    """

    def keep(number: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, number), 1.0 - rate, x.shape[-1:])

    kept = jax.vmap(keep)(numbers.reshape(-1)).reshape(x.shape)
    return jnp.where(kept, x / (1.0 - rate), jnp.zeros_like(x))
