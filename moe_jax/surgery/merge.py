"""Fewer experts: groups of them become one, whose change of the weights is the mean of theirs.

What is averaged are the experts' products A B, since they are what is added to the frozen weight;
the mean of pairs is no pair of the mean. A mean of G products has rank G R, and the best pair of
rank R for it comes from its singular values, without a matrix of the weight's size. The router's
column of the new expert is the mean of the columns, so that its logit is the mean of the logits.

The result is exact where all experts of a router are equal, as after upcycling, and weights sum to
one; otherwise it is not, and what changes is measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.tree import ATTENTION_MODULES, MOE
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.parse import FieldError, located, suggest
from moe_jax.errors import CheckpointError
from moe_jax.surgery.experts import (
    EXPERT_AXIS,
    ROUTER,
    ExpertMethod,
    Leaves,
    expert_counts,
    expert_low_rank,
    expert_method,
    leaves_of,
    projections_of,
    sites_of,
    with_num_experts,
)
from moe_jax.surgery.outcome import SurgeryOutcome, changed_adapter, finished, opened, read_text
from moe_jax.surgery.truncation import Truncated, relative_error, truncated_product
from moe_jax.surgery.upcycle import why_not_exact

Weighting = Literal["average", "utilisation"]
"""How the experts of a group count: all alike, or each by its share of the group's load."""

Groups = Sequence[Sequence[int]]


def merge(
    adapter: SavedAdapter | str | Path,
    *,
    into: int | None = None,
    groups: Groups | None = None,
    weights: Weighting = "average",
    data: str | Path,
    seed: int = 0,
    base: str | Path | None = None,
    output: str | Path | None = None,
) -> SurgeryOutcome:
    """Merges experts; give either `into` or `groups`.

    Into one, a mixture becomes a LoRA.

    Args:
      adapter: a MixLoRA, LoRAMoE or MoLA, or its folder or hub id; without DoRA.
      into: how many experts each router keeps. The two nearest ones become one, and so on.
      groups: instead, which experts become one, the same in all layers: `[[0, 1], [2, 3]]`. Each
        expert stands in one group.
      weights: of the experts of a group.
      data: a file of text, on which load and change are measured.
      seed: for directions that the products leave open; see `truncation`.
      base: the base's folder or hub id; by default the path that it was trained with.
      output: where the adapter is written too; does not exist yet, or is empty.

    Raises:
      UserError: the adapter has no experts, or these arguments do not go with it.
    """
    saved = opened(adapter, output)
    former = expert_method(saved)
    counts = expert_counts(former, saved.model.num_layers)
    _check(former, counts, into, groups, weights)
    number = len(groups) if groups is not None else into or 0
    method = _lora_of(former) if number == 1 else _fewer(former, number)
    text = read_text(saved, data, base, "what changes has to be measured")
    assert text is not None
    measuring = text.measuring(saved)
    loads = measuring.loads() if weights == "utilisation" else {}

    leaves, rng = leaves_of(saved), np.random.default_rng(seed)
    sites = sites_of(leaves)
    merged = {p: leaf for p, leaf in leaves.items() if not any(p in own for own in sites.values())}
    parts: dict[str, list[Truncated]] = {}
    for site, paths in sites.items():
        projections = projections_of(site, paths)
        chosen = [
            _groups_of_layer(leaves, list(projections.values()), layer, count, number, groups)
            for layer, count in enumerate(counts.tolist())
        ]
        shares = [_shares(own, loads[site][i] if loads else None) for i, own in enumerate(chosen)]
        _merge_site(merged, leaves, site, projections, chosen, shares, parts, rng)
    if number == 1:
        merged = _as_lora(merged)
    result = changed_adapter(saved, method, merged)
    errors = {name: relative_error(own) for name, own in parts.items()}
    worst = max(errors, key=errors.__getitem__)
    overall = relative_error([part for own in parts.values() for part in own])
    change = measuring.change_to(result)
    rank = expert_low_rank(former).rank
    how = "plain means" if weights == "average" else f"means weighted by the load on {text.name}"
    models = [former] if isinstance(method, LoraConfig) else [former, method]
    exact = _all_equal(leaves, counts) and not any(why_not_exact(m, saved.model) for m in models)
    cut = (
        f"rank {rank} leaves a relative error of {overall:.3g} in these means, the largest in "
        f"{worst}: {errors[worst]:.3g}"
    )
    notes = [
        f"{counts.max()} experts of each router became {number}, as {how}",
        "exact, up to rounding: all experts of each router are equal"
        if exact
        else "not exact: a mean stands for experts that differ, and the router for fewer",
        cut,
        text.describe(change, "the adapter as it was"),
    ]
    return finished(SurgeryOutcome(result, exact, notes, change, errors), output)


def _check(
    method: ExpertMethod, counts: np.ndarray, into: int | None, groups: Groups | None, weights: Any
) -> None:
    if expert_low_rank(method).dora:
        raise CheckpointError(
            "dora: each expert has lengths of its own for the columns of its weight, so that the "
            "mean of experts is no mean of pairs; experts of DoRA can be pruned, not merged"
        )
    if weights not in get_args(Weighting):
        raise FieldError(
            "weights", f"{weights!r} is unknown; {suggest(weights, get_args(Weighting))}"
        )
    if (into is None) == (groups is None):
        raise FieldError("into", "give either `into` or `groups`")
    most = int(counts.max())
    if into is not None and not 1 <= into < most:
        raise FieldError("into", f"{into}, but a router has {most} experts; give 1 to {most - 1}")
    if groups is None:
        return
    if len(set(counts.tolist())) > 1:
        raise FieldError("groups", "layers have different numbers of experts; give `into`")
    named = sorted(expert for group in groups for expert in group)
    if named != list(range(most)) or not all(groups) or len(groups) == most:
        raise FieldError(
            "groups",
            f"{_written(groups)} has to name each of the experts 0 to {most - 1} once, at "
            "least two of them together",
        )


def _written(groups: Groups) -> str:
    return ";".join(",".join(map(str, group)) for group in groups)


def _fewer(method: ExpertMethod, number: int) -> ExpertMethod:
    return with_num_experts(method, lambda own: min(own, number))


def _lora_of(method: ExpertMethod) -> LoraConfig:
    """The LoRA that a mixture becomes when all its experts become one."""
    pairs = expert_low_rank(method)
    on_attention = any(target in ATTENTION_MODULES for target in method.target_modules)
    if isinstance(method, MixLoraConfig) and on_attention and pairs != method.low_rank:
        raise FieldError(
            "into",
            "1 makes a LoRA, which has one rank, alpha and kind for all modules; here the "
            "experts have others than attention (expert_lora), so give 2 or more",
        )
    with located("the new lora"):
        common = {f.name: getattr(method, f.name) for f in dataclasses.fields(LoraConfig)}
        return LoraConfig(**{**common, **vars(pairs)})


def _as_lora(leaves: Leaves) -> Leaves:
    """The leaves of a mixture of one expert as those of a LoRA."""
    result = {}
    for path, leaf in leaves.items():
        name = path.rpartition("/")[2]
        if path.endswith(ROUTER):
            continue
        is_expert = leaf.ndim == 4  # with layers in front
        new = path.replace(f"/{MOE}/", "/")
        result[new] = np.squeeze(leaf, EXPERT_AXIS[name]) if is_expert else leaf
    return result


def _groups_of_layer(
    leaves: Leaves, stems: Sequence[str], layer: int, count: int, number: int, groups: Groups | None
) -> list[list[int]]:
    """The groups of one router: those that are given, or else the most similar experts."""
    if groups is not None:
        return [sorted(group) for group in groups]
    pairs = [(leaves[f"{s}/lora_A"][layer], leaves[f"{s}/lora_B"][layer]) for s in stems]
    gram = np.sum([product_gram(a[:, :count], b[:count]) for a, b in pairs], axis=0)
    return similar_groups(gram, number)


def _shares(groups: list[list[int]], load: np.ndarray | None) -> list[np.ndarray]:
    """The share of each expert in its group; they sum to one."""
    shares = []
    for group in groups:
        own = np.ones(len(group)) if load is None else load[group].astype(np.float64)
        own = own if own.sum() > 0.0 else np.ones(len(group))  # a group that nothing reached
        shares.append(own / own.sum())
    return shares


def _merge_site(
    merged: Leaves,
    leaves: Leaves,
    site: str,
    projections: Mapping[str, str],
    groups: Sequence[list[list[int]]],
    shares: Sequence[list[np.ndarray]],
    parts: dict[str, list[Truncated]],
    rng: np.random.Generator,
) -> None:
    """Puts the merged leaves of one site into `merged`, and what was cut off into `parts`."""
    width = max(len(own) for own in groups)
    router = f"layers/{site}/{ROUTER}"
    kernel = leaves[router]
    merged[router] = np.zeros((*kernel.shape[:2], width), np.float32)
    for name, stem in projections.items():
        lora_a, lora_b = leaves[f"{stem}/lora_A"], leaves[f"{stem}/lora_B"]
        new_a = np.zeros((*lora_a.shape[:2], width, lora_a.shape[3]), np.float32)
        new_b = np.zeros((len(lora_b), width, *lora_b.shape[2:]), np.float32)
        for layer, (own_groups, own_shares) in enumerate(zip(groups, shares, strict=True)):
            for index, (group, share) in enumerate(zip(own_groups, own_shares, strict=True)):
                part = _mean_pair(lora_a[layer][:, group], lora_b[layer][group], share, rng)
                new_a[layer, :, index], new_b[layer, index] = part.lora_a, part.lora_b
                merged[router][layer, :, index] = kernel[layer][:, group] @ share
                parts.setdefault(name, []).append(part)
        merged[f"{stem}/lora_A"], merged[f"{stem}/lora_B"] = new_a, new_b


def _mean_pair(
    lora_a: np.ndarray, lora_b: np.ndarray, share: np.ndarray, rng: np.random.Generator
) -> Truncated:
    """The pair nearest to the mean of pairs [in, n, R] and [n, R, out]; one pair stays as it is."""
    width, count, rank = lora_a.shape
    if count == 1:
        square = float(product_gram(lora_a, lora_b)[0, 0])
        return Truncated(lora_a[:, 0], lora_b[0], square, 0.0)
    left = (lora_a * share[:, None]).reshape(width, count * rank)
    return truncated_product(left, lora_b.reshape(count * rank, -1), rank, rng)


def _all_equal(leaves: Leaves, counts: np.ndarray) -> bool:
    """Whether every expert of a router has the same pairs, as after upcycling."""
    for paths in sites_of(leaves).values():
        for path in paths:
            if path.endswith(ROUTER):
                continue
            experts = np.moveaxis(leaves[path], EXPERT_AXIS[path.rpartition("/")[2]], 1)
            for own, count in zip(experts, counts, strict=True):
                if not (own[:count] == own[:1]).all():
                    return False
    return True


# FIXME docstring of the merged surgery.similarity:
# """Which experts are nearest to each other, by what they change of the weights."""


def product_gram(lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """Inner products of the experts' products A B, [E, E], without making any of them.

    `<A_i B_i, A_j B_j> = sum((A_i' A_j) * (B_i B_j'))`.

    Args:
      lora_a: [in, E, R].
      lora_b: [E, R, out].
    """
    inner_a = np.einsum("der,dfs->efrs", lora_a, lora_a, dtype=np.float64)
    inner_b = np.einsum("ero,fso->efrs", lora_b, lora_b, dtype=np.float64)
    return np.sum(inner_a * inner_b, axis=(2, 3))


def similar_groups(gram: np.ndarray, number: int) -> list[list[int]]:
    """Merges the two groups whose means are nearest to each other until `number` are left.

    Args:
      gram: inner products of the experts, [E, E].
      number: at most E.

    Returns:
      The groups, each in rising order, by their first experts.
    """
    groups = [[expert] for expert in range(len(gram))]
    while len(groups) > number:
        inner = np.array([[_mean(gram, a, b) for b in groups] for a in groups])
        square = np.diag(inner)[:, None] + np.diag(inner)[None] - 2.0 * inner
        square[np.tril_indices(len(groups))] = np.inf
        first, second = np.unravel_index(np.argmin(square), square.shape)
        groups[first] = sorted(groups[first] + groups.pop(int(second)))
    return sorted(groups)


def _mean(gram: np.ndarray, first: Sequence[int], second: Sequence[int]) -> float:
    """The inner product of two groups' means."""
    return float(gram[np.ix_(first, second)].mean())
