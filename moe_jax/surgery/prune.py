"""Fewer experts: in each layer, those stay that were used most on some text.

What remains is exact on that text where the dropped experts were never chosen and the choice and
weights of the others do not depend on them: with `top_k`, whose weights are renormalised over the
chosen experts, and with `switch` of straight-through weights and a fixed capacity. Probabilities of
the other strategies are shares of all experts, and change with their number.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_jax.adapters.routing import SwitchRouter, TopKRouter
from moe_jax.adapters.routing.router import ROUTERS, Router
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.parse import FieldError
from moe_jax.surgery.experts import (
    expert_counts,
    expert_method,
    leaves_of,
    padded,
    rearranged,
    with_num_experts,
)
from moe_jax.surgery.outcome import SurgeryOutcome, changed_adapter, finished, opened, read_text


def prune(
    adapter: SavedAdapter | str | Path,
    keep: int,
    *,
    data: str | Path,
    base: str | Path | None = None,
    output: str | Path | None = None,
) -> SurgeryOutcome:
    """Keeps the experts of each router that had the most to carry.

    Args:
      adapter: a MixLoRA, LoRAMoE or MoLA, or its folder or hub id.
      keep: how many experts each router keeps; where MoLA's layers have fewer, all of them.
      data: a file of text, on which use and change are measured.
      base: the base's folder or hub id; by default the path that it was trained with.
      output: where the adapter is written too; does not exist yet, or is empty.

    Raises:
      UserError: the adapter has no experts, not more than `keep`, or not enough stay for its
        router.
    """
    saved = opened(adapter, output)
    former = expert_method(saved)
    counts = expert_counts(former, saved.model.num_layers)
    if keep >= counts.max():
        raise FieldError(
            "keep", f"{keep}, but a layer has {counts.max()} experts at most; give fewer"
        )
    method = with_num_experts(former, lambda number: min(number, keep))
    text = read_text(saved, data, base, "use has to be measured")
    assert text is not None
    measuring = text.measuring(saved)
    loads = measuring.loads()
    kept = {site: _most_used(load, counts, keep) for site, load in loads.items()}
    result = changed_adapter(saved, method, rearranged(leaves_of(saved), kept))
    change = measuring.change_to(result)
    lost = _dropped_load(loads, kept)
    exact = lost == 0.0 and _is_independent(former.router)
    number = f"{keep} of {counts.max()} experts"
    notes = [
        f"keeps {number} of each router; the others had {lost:.2%} of the load on {text.name}",
        _statement(lost, former.router, text.name),
        text.describe(change, "the adapter as it was"),
    ]
    return finished(SurgeryOutcome(result, exact, notes, change), output)


def _most_used(load: np.ndarray, counts: np.ndarray, keep: int) -> np.ndarray:
    """The experts that stay, int [L, E'], in their former order, which decides between equals."""
    kept = []
    for own, count in zip(load, counts, strict=True):
        order = np.argsort(-own[:count], kind="stable")
        kept.append(sorted(order[:keep].tolist()))
    return padded(kept)


def _dropped_load(loads: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> float:
    """The share of all load that the dropped experts had."""
    total = remaining = 0.0
    for site, load in loads.items():
        present = kept[site] >= 0
        own = np.take_along_axis(load, np.maximum(kept[site], 0), axis=1).astype(np.float64)
        total += load.sum(dtype=np.float64)
        remaining += np.sum(own * present)
    return max(1.0 - remaining / total, 0.0) if total > 0.0 else 0.0


def _is_independent(router: Router) -> bool:
    """Whether choice and weights of chosen experts do not depend on those that are not chosen."""
    if isinstance(router, SwitchRouter):
        return router.weights == "straight_through" and router.capacity is not None
    return isinstance(router, TopKRouter)


def _statement(lost: float, router: Router, text: str) -> str:
    name = ROUTERS.name_of(router)
    if not _is_independent(router):
        return f"not exact: the weights or capacity of {name!r} depend on all experts there are"
    if lost == 0.0:
        return (
            f"exact on {text}, up to rounding: no token there chose a dropped expert, and the "
            "weights of the others are relative to each other; other text may choose them"
        )
    return "not exact: tokens that chose a dropped expert go to others"
