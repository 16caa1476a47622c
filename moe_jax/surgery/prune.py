"""Drops experts: each layer keeps those that a text uses most.

The result is exact on that text if no token chose a dropped expert and the router's choice and
weights do not depend on experts that are not chosen. This holds for `top_k`, whose weights are
renormalized over the chosen experts, and for `switch` with straight-through weights and a fixed
capacity. With other strategies a weight is a share of all experts and changes with their number.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moe_jax.adapters.routing import SwitchRouter, TopKRouter
from moe_jax.adapters.routing.router import ROUTERS, Router
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.parse import FieldError
from moe_jax.surgery.experts import (
    adapter_leaves,
    expert_counts,
    expert_method,
    gather_experts,
    padded_experts,
    with_num_experts,
)
from moe_jax.surgery.outcome import (
    SurgeryOutcome,
    changed_adapter,
    open_adapter,
    read_text,
    save_outcome,
)


def prune(
    adapter: SavedAdapter | str | Path,
    keep: int,
    *,
    data: str | Path,
    base: str | Path | None = None,
    output: str | Path | None = None,
) -> SurgeryOutcome:
    """Keeps the experts of each router with the highest load.

    Args:
      adapter: a MixLoRA, LoRAMoE or MoLA, or its folder or hub id.
      keep: number of experts that each router keeps; MoLA's layers with fewer keep all.
      data: a text file on which load and change are measured.
      base: folder or hub id of the base; by default the path that the adapter was trained with.
      output: a folder for the adapter; does not exist, or is empty.

    Raises:
      UserError: the adapter has no experts or at most `keep`, `keep` is below 2, or the router
        needs more.
    """
    saved = open_adapter(adapter, output)
    former = expert_method(saved)
    counts = expert_counts(former, saved.model.num_layers)
    if keep >= counts.max():
        raise FieldError(
            "keep", f"{keep}, but a layer has at most {counts.max()} experts; give a smaller number"
        )
    if keep < 2:
        raise FieldError(
            "keep", f"must be at least 2, got {keep}; `moe-jax surgery merge --into 1` gives a LoRA"
        )
    method = with_num_experts(former, lambda number: min(number, keep))
    text = read_text(saved, data, base, "the load of experts has to be measured")
    assert text is not None
    measurement = text.measurement(saved)
    loads = measurement.loads()
    kept = {site: _most_used(load, counts, keep) for site, load in loads.items()}
    result = changed_adapter(saved, method, gather_experts(adapter_leaves(saved), kept))
    change = measurement.logit_change_to(result)
    lost = _dropped_load(loads, kept)
    exact = lost == 0.0 and _is_independent(former.router)
    number = f"{keep} of {counts.max()} experts"
    notes = [
        f"keeps {number} of each router; the others had {lost:.2%} of the load on {text.name}",
        _statement(lost, former.router, text.name),
        text.describe(change, "the original adapter"),
    ]
    return save_outcome(SurgeryOutcome(result, exact, notes, change), output)


def _most_used(load: np.ndarray, counts: np.ndarray, keep: int) -> np.ndarray:
    """The experts with the highest load, int [L, E'], in ascending order."""
    kept = []
    for layer_load, count in zip(load, counts, strict=True):
        order = np.argsort(-layer_load[:count], kind="stable")
        kept.append(sorted(order[:keep].tolist()))
    return padded_experts(kept)


def _dropped_load(loads: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> float:
    """Share of the total load on the dropped experts."""
    total = remaining = 0.0
    for site, load in loads.items():
        present = kept[site] >= 0
        kept_load = np.take_along_axis(load, np.maximum(kept[site], 0), axis=1).astype(np.float64)
        total += load.sum(dtype=np.float64)
        remaining += np.sum(kept_load * present)
    return max(1.0 - remaining / total, 0.0) if total > 0.0 else 0.0


def _is_independent(router: Router) -> bool:
    """True if choice and weights of experts do not depend on the experts that are not chosen."""
    if isinstance(router, SwitchRouter):
        return router.weights == "straight_through" and router.capacity is not None
    return isinstance(router, TopKRouter)


def _statement(lost: float, router: Router, text: str) -> str:
    name = ROUTERS.name_of(router)
    if not _is_independent(router):
        return f"not exact: the weights or capacity of {name!r} depend on the number of experts"
    if lost == 0.0:
        return (
            f"exact on {text}, up to rounding: no token in it chose a dropped expert, and weights "
            "are normalized over the chosen experts; tokens of other texts may choose dropped ones"
        )
    return "not exact: tokens that chose a dropped expert are routed to others"
