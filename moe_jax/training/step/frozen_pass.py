"""Scores of answers without gradients: by references, and for KTO of answers to other prompts.

In a step of preference adapters, some rows are scored before those that are learned. All of them go
through the model in one pass. Rows of the base have no adapter: the base's weights are those that
the adapters train on, so that no reference needs a second copy of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.adapters.method import AdapterMethod, NoAdapter
from moe_jax.adapters.rows import AdapterRows, divide_rows, take_rows
from moe_jax.config.preference import ROWS_PER_EXAMPLE, PreferenceConfig
from moe_jax.data.batch import Batch
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.training.step.forward import forward
from moe_jax.training.step.loss import head_outputs, sum_by_row

Preferences = Mapping[str, PreferenceConfig]
"""Preference losses by adapter; absent for supervised fine-tuning."""


class FrozenLogProbs(NamedTuple):
    """Log-probabilities of an adapter's rows in a micro-batch, without gradients, float32.

    Attributes:
      reference: of each row under the reference, [b]; zeros without one.
      mismatched: of the answers to other prompts under the adapter, for `kto`, [b / 2]; else [0].
    """

    reference: jax.Array
    mismatched: jax.Array


class _Part(NamedTuple):
    """Rows of one adapter that are scored by one model.

    Attributes:
      name: name of the part.
      rows: rows of the adapter in the micro-batch.
      first: first of its rows, each `stride`-th of which is scored.
      stride: see `first`.
      method: method of the model that scores them.
      tree: weights of it; None for the base.
    """

    name: str
    rows: AdapterRows
    first: int
    stride: int
    method: AdapterMethod
    tree: Any


def learned_rows(
    adapter_rows: tuple[AdapterRows, ...], preferences: Preferences
) -> tuple[AdapterRows, ...]:
    """Rows of each adapter that gradients are taken of: of single answers the first of each two."""
    if not _has_single_answers(preferences):
        return adapter_rows
    counts = {rows.name: rows.total // _stride(rows, preferences) for rows in adapter_rows}
    return divide_rows({r.name: r.method for r in adapter_rows}, counts, adapter_rows[0].shards)


def learned_batch(
    adapter_rows: tuple[AdapterRows, ...], preferences: Preferences, batch: Batch
) -> Batch:
    """The rows of `learned_rows` of a batch [B, S]."""
    if not _has_single_answers(preferences):
        return batch
    parts = [(rows, 0, _stride(rows, preferences)) for rows in adapter_rows]
    return Batch(*(_joined(parts, array) for array in batch))


def frozen_log_probs(
    model: LlamaForCausalLM,
    params: Any,
    adapters: Mapping[str, Any],
    references: Mapping[str, Any],
    preferences: Preferences,
    batch: Batch,
    *,
    packed: bool = False,
) -> dict[str, FrozenLogProbs]:
    """Scores the rows of preference adapters that are not learned, by adapter.

    Args:
      model: with the adapter rows of `batch`.
      params: the frozen base parameters.
      adapters: adapter trees by name.
      references: trees of the references that are adapters, by the adapter that learns.
      preferences: losses of the adapters.
      batch: [B, S].
      packed: see `forward`.
    """
    parts = _parts(model.adapter_rows, adapters, references, preferences)
    scores = dict[str, jax.Array]()
    if parts:
        counts = {part.name: part.rows.total // part.stride for part in parts}
        methods = {part.name: part.method for part in parts}
        part_rows = divide_rows(methods, counts, parts[0].rows.shards)
        chosen = [(part.rows, part.first, part.stride) for part in parts]
        scored = Batch(*(_joined(chosen, array) for array in batch))
        trees = {part.name: part.tree for part in parts if part.tree is not None}
        outputs, _ = forward(
            model.clone(adapter_rows=part_rows), params, trees, scored, head_outputs, packed=packed
        )
        losses, _ = sum_by_row(outputs.token_losses, scored)
        scores = {rows.name: -take_rows(rows, losses) for rows in part_rows}
    found = {}
    for rows in model.adapter_rows:
        preference = preferences.get(rows.name)
        if preference is None:
            continue
        stored = jnp.sum(take_rows(rows, batch.reference_log_probs), axis=-1)
        reference = scores.get(_reference_name(rows), stored)
        mismatched = scores.get(_trained_name(rows), jnp.zeros(0))
        found[rows.name] = FrozenLogProbs(reference, mismatched)
    return jax.lax.stop_gradient(found)


def _parts(
    adapter_rows: tuple[AdapterRows, ...],
    adapters: Mapping[str, Any],
    references: Mapping[str, Any],
    preferences: Preferences,
) -> list[_Part]:
    parts = []
    for rows in adapter_rows:
        preference = preferences.get(rows.name)
        if preference is None:
            continue
        if preference.step_reference is not None:
            tree = references[rows.name] if preference.step_reference == "start" else None
            method = NoAdapter() if tree is None else rows.method
            parts.append(_Part(_reference_name(rows), rows, 0, 1, method, tree))
        if preference.estimates_kl:
            tree = adapters[rows.name]
            name = _trained_name(rows)
            parts.append(_Part(name, rows, 1, ROWS_PER_EXAMPLE, rows.method, tree))
    return parts


def _reference_name(rows: AdapterRows) -> str:
    return f"reference.{rows.name}"


def _trained_name(rows: AdapterRows) -> str:
    return f"trained.{rows.name}"


def _has_single_answers(preferences: Preferences) -> bool:
    return any(loss.answers_per_example < ROWS_PER_EXAMPLE for loss in preferences.values())


def _stride(rows: AdapterRows, preferences: Preferences) -> int:
    preference = preferences.get(rows.name)
    return 1 if preference is None else ROWS_PER_EXAMPLE // preference.answers_per_example


def _joined(parts: list[tuple[AdapterRows, int, int]], array: jax.Array) -> jax.Array:
    """Rows of several parts (rows, first, stride) of `array` [B, ...], joined shard by shard."""
    shards = parts[0][0].shards
    sharded = array.reshape(shards, -1, *array.shape[1:])
    taken = [sharded[:, rows.start + first : rows.stop : stride] for rows, first, stride in parts]
    joined = taken[0] if len(taken) == 1 else jnp.concatenate(taken, axis=1)
    return joined.reshape(-1, *array.shape[1:])
