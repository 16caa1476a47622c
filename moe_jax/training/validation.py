"""Loss on held-out rows."""

import collections
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from moe_jax.data.batch import Batch
from moe_jax.errors import DataError
from moe_jax.training.program import Program
from moe_jax.training.rows import pad_to_multiple

_AHEAD = 4
"""Batches that the device may be behind; each holds memory."""


def validation_losses(
    program: Program,
    adapters: Any,
    params: Any,
    data: Mapping[str, Mapping[str, Iterable[Batch]]],
) -> dict[str, float]:
    """Mean cross-entropy per target token, in nats, of every validation set, by `adapter/set`.

    Args:
      program: the compiled computations.
      adapters: `{adapter name: tree}`; may hold others too.
      params: the frozen base.
      data: the validation sets of each adapter, as NumPy batches.

    Raises:
      DataError: a set without any target token.
    """
    return {
        f"{adapter}/{name}": _mean_loss(program, adapter, name, adapters, params, batches)
        for adapter, sets in data.items()
        for name, batches in sets.items()
    }


def _mean_loss(
    program: Program,
    adapter: str,
    name: str,
    adapters: Any,
    params: Any,
    batches: Iterable[Batch],
) -> float:
    ways = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    pending: collections.deque[tuple[jax.Array, jax.Array]] = collections.deque()
    losses, counts = [], []

    def collect(keep: int) -> None:
        while len(pending) > keep:
            loss, count = jax.device_get(pending.popleft())
            losses.append(float(loss))
            counts.append(float(count))

    for batch in batches:
        rows = program.put_eval_batch(pad_to_multiple(batch, ways))
        pending.append(program.eval_step(adapter, adapters, params, rows))
        collect(_AHEAD)
    collect(0)
    if not sum(counts):
        raise DataError(
            f"config.adapters.{adapter}.data.validation.{name}: no row has a token to predict"
        )
    return math.fsum(losses) / math.fsum(counts)
