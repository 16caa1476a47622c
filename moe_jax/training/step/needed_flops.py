"""FLOPs that a training step needs, counted from shapes; 2 for each multiply-add.

Needed are, for each real token:

- 4 for each frozen weight of a product: 2 forward, and 2 for the gradient of its input. The
  embedding is a look-up. The head has a product for every token, and none for the rows of a
  classifier.
- 6 for each adapter weight that the token uses: 2 more for the weight's own gradient. Of E experts
  these are the C that the router selects, and all where it mixes all or selects any number. Of a
  score head, which reads one position of a sequence, nothing is counted.
- 12 a query channel for each earlier or equal position of its sequence that attention lets it see,
  in each layer: 4 forward (scores, and sum of values) and 8 backward.
- 18 for each number of the states of linear attention: 6 forward (the product with the key, the
  change of the state, the product with the query) and 12 backward. A program that computes chunks
  of tokens has other products.

A preference loss with a reference that scores in the step needs one more forward pass of the
reference: 2 a weight, and 4 a channel and position. KTO's answers to other prompts are only scored,
by the adapter and by the reference.

Recomputation, padding, optimizer, norms and other elementwise operations are not needed in this
sense: a program that spends more on them has a lower share of its device's rate. XLA cannot count
instead: on GPUs most products are calls of libraries, which it does not see into.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.adapters.method import AdapterMethod
from moe_jax.config.attention import (
    FFN,
    GLOBAL_ATTENTION,
    LINEAR_ATTENTION,
    READERS,
    SELF_ATTENTION,
    WIDE_FFN,
)
from moe_jax.config.model import ModelConfig
from moe_jax.config.preference import ROWS_PER_EXAMPLE, PreferenceConfig
from moe_jax.data.batch import Batch

FROZEN_FLOPS, TRAINED_FLOPS = 4, 6
"""FLOPs for each weight of a product and token."""

FORWARD_FLOPS = 2
"""FLOPs for each weight of a product and token of a pass without gradients."""

FORWARD_SHARE = 1 / 3
"""Share of attention's FLOPs that a pass without gradients needs."""

ATTENTION_FLOPS = 12
"""FLOPs for each query channel and pair of positions."""

STATE_FLOPS = 18
"""FLOPs for each number of a state of linear attention and token."""


class RowFlops(NamedTuple):
    """FLOPs of a row of a batch, over all passes.

    Attributes:
      token: FLOPs of a token besides attention.
      attention: FLOPs of attention, as a multiple of those of a row that is learned.
    """

    token: float
    attention: float


class NeededFlops(NamedTuple):
    """FLOPs that a step of a model with adapters needs.

    Attributes:
      token: FLOPs of a token that is learned besides attention, by adapter.
      rows: FLOPs of each row of an example, by adapter; of most adapters it has one row.
      pair: FLOPs of a pair of positions in all layers with full attention.
      sliding_pair: FLOPs of a pair of positions in all layers with sliding attention.
      window: number of positions that sliding attention sees.
    """

    token: Mapping[str, float]
    rows: Mapping[str, tuple[RowFlops, ...]]
    pair: float
    sliding_pair: float
    window: int

    def of_batch(self, batch: Batch, rows: Mapping[str, int]) -> float:
        """FLOPs of a batch.

        Args:
          batch: batch of NumPy arrays [B, S]; padding counts for nothing.
          rows: number of rows of each adapter, which follow one another in the batch.
        """
        real = np.asarray(batch.segment_ids) > 0
        # A token sees itself and the tokens before it in its sequence.
        seen = np.where(real, np.asarray(batch.positions) + 1, 0)
        starts, flops = np.cumsum([0, *rows.values()]), 0.0
        for name, start, stop in zip(rows, starts, starts[1:], strict=False):
            size = len(self.rows[name])
            for offset, cost in enumerate(self.rows[name]):
                part = slice(start + offset, stop, size)
                flops += cost.token * int(real[part].sum())
                flops += cost.attention * self._attention(seen[part])
        return flops

    def of_full_rows(self, rows: Mapping[str, int], length: int) -> float:
        """FLOPs of rows that each are one sequence without padding.

        Args:
          rows: number of rows of each adapter.
          length: number of tokens of a row.
        """
        attention = self._attention(np.arange(1, length + 1))
        return sum(
            count / len(self.rows[name]) * (length * cost.token + cost.attention * attention)
            for name, count in rows.items()
            for cost in self.rows[name]
        )

    def _attention(self, seen: np.ndarray) -> float:
        """FLOPs of attention, from the number of positions that each token sees in full layers."""
        within = np.minimum(seen, self.window)
        return self.pair * int(seen.sum()) + self.sliding_pair * int(within.sum())


def needed_flops(
    model: ModelConfig,
    methods: Mapping[str, AdapterMethod],
    adapters: Mapping[str, Any],
    preferences: Mapping[str, PreferenceConfig] = MappingProxyType({}),
) -> NeededFlops:
    """Counts the FLOPs that a step needs.

    Args:
      model: architecture of the base.
      methods: method of each adapter.
      adapters: tree of each adapter, of arrays or shapes, with layers stacked.
      preferences: preference losses of adapters.
    """
    channels = model.num_heads * model.head_dim
    sliding = sum(model.sliding_layers)
    full = model.num_layers - sliding - len(model.layers_with(LINEAR_ATTENTION))
    full_channels = full * model.num_heads * model.full_head_dim
    frozen = {name: _frozen_weights(model, method) for name, method in methods.items()}
    used = {
        name: _used_weights(method, adapters[name]) + _new_weights(model, method)
        for name, method in methods.items()
    }
    states = STATE_FLOPS * _states(model)
    token = {
        name: states + FROZEN_FLOPS * frozen[name] + TRAINED_FLOPS * used[name] for name in methods
    }
    return NeededFlops(
        token=token,
        rows={
            name: _row_flops(token[name], states, frozen[name], used[name], preferences.get(name))
            for name in methods
        },
        pair=float(ATTENTION_FLOPS * full_channels),
        sliding_pair=float(ATTENTION_FLOPS * channels * sliding),
        window=model.sliding_window or 0,
    )


def _row_flops(
    token: float, states: float, frozen: int, used: float, preference: PreferenceConfig | None
) -> tuple[RowFlops, ...]:
    """FLOPs of each row of an example of an adapter.

    Args:
      token: FLOPs of a token that is learned.
      states: those of them for the states of linear attention.
      frozen: frozen weights of a token's products.
      used: adapter weights of them.
      preference: preference loss of the adapter.
    """
    learned = RowFlops(token, 1.0)
    if preference is None:
        return (learned,)
    forward = FORWARD_SHARE * states
    scored = RowFlops(forward + FORWARD_FLOPS * (frozen + used), FORWARD_SHARE)
    second = learned
    if preference.answers_per_example < ROWS_PER_EXAMPLE:
        second = scored if preference.estimates_kl else RowFlops(0.0, 0.0)
    if preference.step_reference is None:
        return learned, second
    weights = frozen + used if preference.step_reference == "start" else frozen
    return tuple(
        RowFlops(row.token + forward + FORWARD_FLOPS * weights, row.attention + FORWARD_SHARE)
        for row in (learned, second)
    )


def _frozen_weights(model: ModelConfig, method: AdapterMethod) -> int:
    """Number of frozen weights that a token is multiplied with."""
    width, depth = model.hidden_size, model.num_layers
    layers = sum(
        size * len(model.layers_with(module)) for module, size in _attention_widths(model).items()
    )
    layers += 3 * model.intermediate_size * len(model.layers_with(FFN))
    layers += 3 * (model.reader_ffn_width or 0) * len(model.layers_with(WIDE_FFN))
    # The projection of the embedding, whose input needs no gradient, is a half.
    layers += int(2.5 * depth * (model.layer_embedding_width or 0))
    head = model.vocab_size if method.classification is None else 0
    return width * (layers + head)


def _attention_widths(model: ModelConfig) -> dict[str, int]:
    """Channels of all projections of a layer's attention, by its module."""
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    gates = queries if model.attention_gate else 0
    widths = {SELF_ATTENTION: 2 * queries + gates + 2 * keys, READERS[SELF_ATTENTION]: 2 * queries}
    if model.global_attention is not None:
        sizes = model.global_attention
        kv_heads = sizes.num_kv_heads * (1 if sizes.key_as_value else 2)
        widths[GLOBAL_ATTENTION] = sizes.head_dim * (2 * model.num_heads + kv_heads)
        widths[READERS[GLOBAL_ATTENTION]] = sizes.head_dim * 2 * model.num_heads
    if model.delta_net is not None:
        net = model.delta_net
        widths[LINEAR_ATTENTION] = net.mixed_dim + 2 * net.value_dim + 2 * net.num_value_heads
    return widths


def _states(model: ModelConfig) -> int:
    """Numbers in the states of all layers with linear attention."""
    net = model.delta_net
    if net is None:
        return 0
    return len(model.layers_with(LINEAR_ATTENTION)) * net.value_dim * net.key_head_dim


def _new_weights(model: ModelConfig, method: AdapterMethod) -> int:
    """Number of weights of the head's rows for new tokens."""
    return model.hidden_size * len(method.new_tokens) if method.classification is None else 0


def _used_weights(method: AdapterMethod, tree: Any) -> float:
    """Number of weights of an adapter that a token is multiplied with."""
    used = 0.0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [str(getattr(entry, "key", entry)) for entry in path]
        match names:
            case [*_, "lora_A" | "lora_B" as name] if leaf.ndim == 4:
                # A is [L, in, E, R] and B is [L, E, R, out].
                experts = leaf.shape[2 if name == "lora_A" else 1]
                used += leaf.size * _selected(method, experts) / experts
            case [*_, "lora_A" | "lora_B"] | [*_, "router", "kernel"]:
                used += leaf.size
    return used


def _selected(method: AdapterMethod, experts: int) -> int:
    """Number of experts, of `experts`, that compute for a token."""
    router: Any = getattr(method, "router", None)
    if router is None:
        return experts
    logits = jax.ShapeDtypeStruct((1, 1, experts), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1), jnp.bool)
    routing = jax.eval_shape(router.route, logits, mask)
    return min(routing.weights.shape[-1], experts)
