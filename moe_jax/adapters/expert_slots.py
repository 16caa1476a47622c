"""The expert slots of MixLoRA: hidden activations of each token's experts, and their sum.

The letters are those of `moe_jax.adapters.mixlora`.

At [T, F], what a slot reads and writes takes longer than its products, which are thin. Two slots
are therefore written out, and share what they can:

    gate_0 = x W_gate + (dispatch_0 * z_gate) B_gate
    gate_1 = gate_0 + ((dispatch_1 - dispatch_0) * z_gate) B_gate

and `up` alike. The backward pass keeps gate_0 in place of the frozen product, and computes only the
second delta again. Of its gradients it needs the sum over the slots, which is the gradient of the
frozen product, and that of slot 1.

In bfloat16 the other slots carry the roundings of the first, which has the largest weight. Relative
to the largest value of a token or an expert, the median error of the result grew from 0.26% to
0.43%, and of the gradients of B from 0.27% to 0.55% (random normal inputs, deltas of 0.4 times the
products); to 5% if one expert's delta is 100 times larger. In float32 both are below 2e-6.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax.adapters.lora.low_rank import ExpertPairs
from moe_jax.layers.activation import gated
from moe_jax.layers.dropout import dropout
from moe_jax.layers.frozen import frozen_product
from moe_jax.layers.names import NARROW_PRODUCT, WIDE_PRODUCT
from moe_jax.layers.quantized import Kernel

MAX_UNROLLED_SLOTS = 2
"""Largest number of slots that the program holds side by side. More slots are the steps of a loop,
whose backward pass recomputes each step, so that memory does not grow with their number."""


class SlotInputs(NamedTuple):
    """Inputs that all expert slots share; see the letters above.

    Attributes:
      gate: frozen product x W_gate, [T, F], without its bias.
      up: frozen product x W_up, [T, F], without its bias.
      gate_bias, up_bias: [F]; None without a bias.
      activation: activation function of the gate.
      down_kernel: frozen W_down [F, D], for DoRA on `down_proj`; None without it.
      hidden_dropout: share of h_c that is dropped, a scalar; None for none.
      down_dropout: share of h_c that the pair of `down_proj` does not see, a scalar; None for none.
    """

    gate: jax.Array
    up: jax.Array
    gate_bias: jax.Array | None
    up_bias: jax.Array | None
    activation: Callable[[jax.Array], jax.Array]
    down_kernel: Kernel | None
    hidden_dropout: jax.Array | None
    down_dropout: jax.Array | None


def expert_slot(
    inputs: SlotInputs,
    pairs: Mapping[str, ExpertPairs],
    z: Mapping[str, jax.Array],
    dispatch: jax.Array,
    weights: jax.Array,
    keys: jax.Array | None,
    added: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """One slot of every token.

    Args:
      inputs: inputs of all slots.
      pairs: low-rank pairs that the slot selects from, by projection.
      z: low-rank activations [T, E, R] of the adapted ones of `gate_proj` and `up_proj`.
      dispatch: [T, E], one-hot; zero for a token whose slot has no expert, which then is the frozen
        FFN.
      weights: [T].
      keys: two dropout keys; None drops nothing.
      added: [T, E], one-hot; the expert whose deltas `inputs.gate` and `inputs.up` contain, instead
        of which the slot has its own; None if they contain none.

    Returns:
      The weighted hidden activation h_c [T, F], and the low-rank activations of the slot's expert
      on `down_proj`, [T, E, R], None if it is not adapted. With DoRA on `down_proj` the first is
      the slot's output [T, D] instead, since DoRA rescales the down projection of each expert.
    """
    dtype = inputs.gate.dtype
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    change = dispatch if added is None else dispatch - added

    def adapt(target: str, product: jax.Array, bias: jax.Array | None) -> jax.Array:
        wide_product = product.astype(wide)
        if target in pairs:
            delta = selected_delta(pairs[target], z[target], change, dtype)
            # With DoRA, `lora_b` contains the gains already; without, `rescale` changes nothing.
            wide_product = pairs[target].rescale(wide_product, dispatch) + delta.astype(wide)
        return wide_product if bias is None else wide_product + bias[None].astype(wide)

    # In float32, the sums are part of the kernel of the activation. In half precision, XLA adds
    # them to the product's copy on GPUs, which reads and writes [T, F] once more for each sum.
    gate = adapt("gate_proj", inputs.gate, inputs.gate_bias)
    up = adapt("up_proj", inputs.up, inputs.up_bias)
    hidden = gated(inputs.activation, gate, up, weights.astype(wide)[:, None]).astype(dtype)
    if keys is not None and inputs.hidden_dropout is not None:
        hidden = dropout(hidden, inputs.hidden_dropout, keys[0])
    if "down_proj" not in pairs:
        return hidden, None
    down, dropped = pairs["down_proj"], hidden
    if keys is not None and inputs.down_dropout is not None:
        dropped = dropout(hidden, inputs.down_dropout, keys[1])
    z_down = down.activations(dropped)
    z_down = jnp.einsum("ter,te->ter", z_down, dispatch.astype(hidden.dtype))
    if inputs.down_kernel is None:
        return hidden, z_down
    product = checkpoint_name(frozen_product(hidden, inputs.down_kernel), NARROW_PRODUCT)
    return down.rescale(product, dispatch), z_down


def selected_delta(
    pair: ExpertPairs, z: jax.Array, change: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`sum_e change_e z_e B_e`, [T, F] in `dtype`.

    Args:
      pair: low-rank pairs of a projection.
      z: [T, E, R].
      change: [T, E], one-hot or the difference of two one-hot vectors.
      dtype: dtype of the product.
    """
    selected = jnp.einsum("ter,te->ter", z, change.astype(dtype))
    return jnp.einsum("ter,erf->tf", selected, pair.lora_b.astype(dtype))


def expert_slots(
    inputs: SlotInputs,
    pairs: Mapping[str, ExpertPairs],
    z: Mapping[str, jax.Array],
    dispatch: jax.Array | None,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The sum of all slots; see `expert_slot` for the two results, the second for all E experts.

    Args:
      inputs, pairs, z: see `expert_slot`.
      dispatch: [T, C, E]; None where slot c is expert c for every token (C = E).
      weights: [T, C].
      keys: two dropout keys for each slot, [C, 2]; None drops nothing.
    """
    num_slots = weights.shape[1]
    if dispatch is not None:  # one-hot vectors have no gradient
        dispatch = jax.lax.stop_gradient(dispatch)
        if num_slots <= MAX_UNROLLED_SLOTS and not any(p.gains is not None for p in pairs.values()):
            return _unrolled_slots(inputs, pairs, z, dispatch, weights, keys)
    inputs = inputs._replace(
        gate=checkpoint_name(inputs.gate, WIDE_PRODUCT),
        up=checkpoint_name(inputs.up, WIDE_PRODUCT),
    )
    stacked: dict[str, Any] = {"weights": weights.T, "keys": keys}
    if dispatch is None:  # each slot selects from one pair, always that pair
        stacked["pairs"] = {target: pair.experts_first() for target, pair in pairs.items()}
        stacked["z"] = {target: jnp.moveaxis(z[target], 1, 0)[:, :, None] for target in z}
        stacked["dispatch"] = jnp.ones_like(stacked["weights"])[..., None]
        slot = functools.partial(expert_slot, inputs)
    else:
        stacked["dispatch"] = jnp.moveaxis(dispatch, 1, 0)
        slot = functools.partial(expert_slot, inputs, pairs, z)

    def add_slot(total: jax.Array, slot_inputs: Any) -> tuple[jax.Array, jax.Array | None]:
        output, z_down = slot(**slot_inputs)
        return total + output, z_down

    if num_slots > MAX_UNROLLED_SLOTS:
        policy = jax.checkpoint_policies.save_only_these_names(NARROW_PRODUCT)
        add_slot = jax.checkpoint(add_slot, policy=policy)
    wide = inputs.gate if inputs.down_kernel is None else inputs.down_kernel
    zeros = jnp.zeros((len(inputs.gate), wide.shape[-1]), inputs.gate.dtype)
    unroll = num_slots if num_slots <= MAX_UNROLLED_SLOTS else 1
    total, z_down = jax.lax.scan(add_slot, zeros, stacked, unroll=unroll)
    if z_down is None:
        return total, None
    if dispatch is None:
        return total, jnp.moveaxis(jnp.squeeze(z_down, 2), 0, 1)
    return total, jnp.sum(z_down, axis=0)


def _unrolled_slots(
    inputs: SlotInputs,
    pairs: Mapping[str, ExpertPairs],
    z: Mapping[str, jax.Array],
    dispatch: jax.Array,
    weights: jax.Array,
    keys: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """`expert_slots` of few slots, without DoRA.

    The deltas of the first slot are added to the frozen products, and the sums are kept in place of
    the products. The others exchange the first slot's expert for their own. In the backward pass no
    delta of the first slot is computed again, and its gradient is that of the frozen products.
    """

    def with_first(target: str, product: jax.Array) -> jax.Array:
        if target in pairs:
            first = selected_delta(pairs[target], z[target], dispatch[:, 0], product.dtype)
            product = product + first
        return checkpoint_name(product, WIDE_PRODUCT)

    inputs = inputs._replace(
        gate=with_first("gate_proj", inputs.gate), up=with_first("up_proj", inputs.up)
    )
    down = {target: pair for target, pair in pairs.items() if target == "down_proj"}
    slots = [
        expert_slot(
            inputs,
            pairs if slot else down,
            z,
            dispatch[:, slot],
            weights[:, slot],
            None if keys is None else keys[slot],
            added=dispatch[:, 0] if slot else None,
        )
        for slot in range(weights.shape[1])
    ]
    add = functools.partial(functools.reduce, jnp.add)
    hidden, z_down = zip(*slots, strict=True)
    return add(hidden), add(z_down) if down else None
