"""Merges groups of experts into one expert each, by the mean of their weight changes.

The mean is taken over the products A B, which are added to the frozen weight. (The product of mean
pairs is different.) The mean of G products has rank G R. The nearest pair of rank R follows from
its singular value decomposition, without a matrix of the weight's size. The router column of the
new expert is the mean of the columns, so its logit is the mean of the logits.

The result is exact if all experts of a router are equal, as after upcycling, and weights sum to
one. Otherwise the change is measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.adapters.mixlora import MixLoraConfig
from moe_jax.adapters.tree import MLP_MODULES, MOE
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.parse import FieldError, located, suggest
from moe_jax.errors import CheckpointError
from moe_jax.surgery.experts import (
    EXPERT_AXIS,
    ROUTER_KERNEL,
    ExpertMethod,
    Leaves,
    adapter_leaves,
    expert_counts,
    expert_low_rank,
    expert_method,
    routed_sites,
    site_projections,
    with_num_experts,
)
from moe_jax.surgery.outcome import (
    SurgeryOutcome,
    changed_adapter,
    open_adapter,
    read_text,
    save_outcome,
)
from moe_jax.surgery.truncation import NearestPair, nearest_pair_of_product, relative_error
from moe_jax.surgery.upcycle import inexactness_reason

Weighting = Literal["average", "utilization"]
"""Weights of the experts in a mean: equal, or proportional to each expert's load."""

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

    A mixture merged into one expert becomes a LoRA.

    Args:
      adapter: a MixLoRA, LoRAMoE or MoLA, or its folder or hub id; without DoRA.
      into: number of experts that each router keeps; the two nearest groups merge repeatedly.
      groups: instead, the groups to merge in all layers: `[[0, 1], [2, 3]]`. Each expert belongs
        to one group.
      weights: weights of the experts of a group.
      data: a text file on which load and change are measured.
      seed: seed of A's columns beyond the rank of a mean; see `truncation`.
      base: folder or hub id of the base; by default the path that the adapter was trained with.
      output: a folder for the adapter; does not exist, or is empty.

    Raises:
      UserError: the adapter has no experts, or an argument is invalid for it.
    """
    saved = open_adapter(adapter, output)
    former = expert_method(saved)
    counts = expert_counts(former, saved.model.num_layers)
    _check(former, counts, into, groups, weights)
    number = len(groups) if groups is not None else into or 0
    if number == 1:
        method = _lora_method(former)
    else:
        method = with_num_experts(former, lambda count: min(count, number))
    text = read_text(saved, data, base, "the change has to be measured")
    assert text is not None
    measurement = text.measurement(saved)
    loads = measurement.loads() if weights == "utilization" else {}

    leaves, rng = adapter_leaves(saved), np.random.default_rng(seed)
    merged, pairs = _merge_sites(leaves, counts, number, groups, loads, rng)
    result = changed_adapter(saved, method, _lora_leaves(merged) if number == 1 else merged)
    change = measurement.logit_change_to(result)
    means = "plain means" if weights == "average" else f"means weighted by the load on {text.name}"
    models = [former] if isinstance(method, LoraConfig) else [former, method]
    inexact = any(inexactness_reason(model, saved.model) for model in models)
    exact = _has_equal_experts(leaves, counts) and not inexact
    errors = {name: relative_error(layers) for name, layers in pairs.items()}
    worst = max(errors, key=errors.__getitem__)
    overall = relative_error([pair for layers in pairs.values() for pair in layers])
    notes = [
        f"{counts.max()} experts of each router were merged into {number}, by {means}",
        "exact, up to rounding: all experts of each router are equal"
        if exact
        else "not exact: means replace experts that differ, and their router columns",
        f"the rank has a relative error of {overall:.3g}; largest in {worst}: {errors[worst]:.3g}",
        text.describe(change, "the original adapter"),
    ]
    return save_outcome(SurgeryOutcome(result, exact, notes, change, errors), output)


def _check(
    method: ExpertMethod, counts: np.ndarray, into: int | None, groups: Groups | None, weights: Any
) -> None:
    if expert_low_rank(method).dora:
        raise CheckpointError(
            "dora: each expert rescales the columns of its weight, so a mean of experts is not a "
            "pair on the frozen weight; prune the experts instead"
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
        raise FieldError("groups", "layers have different numbers of experts; give `into` instead")
    named = sorted(expert for group in groups for expert in group)
    if named != list(range(most)) or not all(groups) or len(groups) == most:
        given = ";".join(",".join(map(str, group)) for group in groups)
        raise FieldError(
            "groups",
            f"{given} must name each of the experts 0 to {most - 1} once, at least two "
            "of them in one group",
        )


def _lora_method(method: ExpertMethod) -> LoraConfig:
    """Method of the LoRA that results from merging all experts of a mixture."""
    low_rank = expert_low_rank(method)
    on_attention = any(target not in MLP_MODULES for target in method.target_modules)
    if isinstance(method, MixLoraConfig) and on_attention and low_rank != method.low_rank:
        raise FieldError(
            "into",
            "1 results in a LoRA, which has one rank, alpha and kind for all modules; here experts "
            "differ from attention (expert_lora), so give 2 or more",
        )
    with located("the new lora"):
        common = {f.name: getattr(method, f.name) for f in dataclasses.fields(LoraConfig)}
        return LoraConfig(**{**common, **vars(low_rank)})


def _lora_leaves(leaves: Leaves) -> Leaves:
    """Converts the leaves of a mixture of one expert to those of a LoRA."""
    result = {}
    for path, leaf in leaves.items():
        name = path.rpartition("/")[2]
        if path.endswith(ROUTER_KERNEL):
            continue
        is_expert = leaf.ndim == 4  # with the layer axis
        new = path.replace(f"/{MOE}/", "/")
        result[new] = np.squeeze(leaf, EXPERT_AXIS[name]) if is_expert else leaf
    return result


def _merge_sites(
    leaves: Leaves,
    counts: np.ndarray,
    number: int,
    groups: Groups | None,
    loads: Mapping[str, np.ndarray],
    rng: np.random.Generator,
) -> tuple[Leaves, dict[str, list[NearestPair]]]:
    """Leaves with merged experts, and the merged pairs of each projection with their errors."""
    sites = routed_sites(leaves)
    routed = {path for paths in sites.values() for path in paths}
    merged = {path: leaf for path, leaf in leaves.items() if path not in routed}
    pairs: dict[str, list[NearestPair]] = {}
    for site, paths in sites.items():
        projections = site_projections(site, paths)
        site_groups = [
            _layer_groups(leaves, list(projections.values()), layer, count, number, groups)
            for layer, count in enumerate(counts.tolist())
        ]
        shares = [
            _shares(layer_groups, loads[site][layer] if loads else None)
            for layer, layer_groups in enumerate(site_groups)
        ]
        _merge_site(merged, leaves, site, projections, site_groups, shares, pairs, rng)
    return merged, pairs


def _layer_groups(
    leaves: Leaves, stems: Sequence[str], layer: int, count: int, number: int, groups: Groups | None
) -> list[list[int]]:
    """Groups of one router: the given groups, or else groups of the most similar experts."""
    if groups is not None:
        return [sorted(group) for group in groups]
    pairs = [(leaves[f"{s}/lora_A"][layer], leaves[f"{s}/lora_B"][layer]) for s in stems]
    gram = np.sum([product_gram(a[:, :count], b[:count]) for a, b in pairs], axis=0)
    return similar_groups(gram, number)


def _shares(groups: list[list[int]], load: np.ndarray | None) -> list[np.ndarray]:
    """The share of each expert in its group; they sum to one."""
    shares = []
    for group in groups:
        weights = np.ones(len(group)) if load is None else load[group].astype(np.float64)
        if weights.sum() == 0.0:  # no token was routed to this group
            weights = np.ones(len(group))
        shares.append(weights / weights.sum())
    return shares


def _merge_site(
    merged: Leaves,
    leaves: Leaves,
    site: str,
    projections: Mapping[str, str],
    groups: Sequence[list[list[int]]],
    shares: Sequence[list[np.ndarray]],
    pairs: dict[str, list[NearestPair]],
    rng: np.random.Generator,
) -> None:
    """Adds the merged leaves of one site to `merged`, and its pairs with errors to `pairs`."""
    width = max(len(layer_groups) for layer_groups in groups)
    router = f"layers/{site}/{ROUTER_KERNEL}"
    kernel = leaves[router]
    merged[router] = np.zeros((*kernel.shape[:2], width), np.float32)
    for name, stem in projections.items():
        lora_a, lora_b = leaves[f"{stem}/lora_A"], leaves[f"{stem}/lora_B"]
        new_a = np.zeros((*lora_a.shape[:2], width, lora_a.shape[3]), np.float32)
        new_b = np.zeros((len(lora_b), width, *lora_b.shape[2:]), np.float32)
        for layer, layer_items in enumerate(zip(groups, shares, strict=True)):
            for index, (group, share) in enumerate(zip(*layer_items, strict=True)):
                pair = _mean_pair(lora_a[layer][:, group], lora_b[layer][group], share, rng)
                new_a[layer, :, index], new_b[layer, index] = pair.lora_a, pair.lora_b
                merged[router][layer, :, index] = kernel[layer][:, group] @ share
                pairs.setdefault(name, []).append(pair)
        merged[f"{stem}/lora_A"], merged[f"{stem}/lora_B"] = new_a, new_b


def _mean_pair(
    lora_a: np.ndarray, lora_b: np.ndarray, share: np.ndarray, rng: np.random.Generator
) -> NearestPair:
    """The pair nearest to the mean of pairs [in, n, R] and [n, R, out]; one pair is unchanged."""
    width, count, rank = lora_a.shape
    if count == 1:
        square = float(product_gram(lora_a, lora_b)[0, 0])
        return NearestPair(lora_a[:, 0], lora_b[0], square, 0.0)
    left = (lora_a * share[:, None]).reshape(width, count * rank)
    return nearest_pair_of_product(left, lora_b.reshape(count * rank, -1), rank, rng)


def _has_equal_experts(leaves: Leaves, counts: np.ndarray) -> bool:
    """True if all experts of each router have equal pairs, as after upcycling."""
    for paths in routed_sites(leaves).values():
        for path in paths:
            if path.endswith(ROUTER_KERNEL):
                continue
            experts = np.moveaxis(leaves[path], EXPERT_AXIS[path.rpartition("/")[2]], 1)
            for layer, count in zip(experts, counts, strict=True):
                if not (layer[:count] == layer[:1]).all():
                    return False
    return True


def product_gram(lora_a: np.ndarray, lora_b: np.ndarray) -> np.ndarray:
    """Inner products of the experts' products A B, [E, E], without computing the products.

    `<A_i B_i, A_j B_j> = sum((A_i' A_j) * (B_i B_j'))`.

    Args:
      lora_a: [in, E, R].
      lora_b: [E, R, out].
    """
    inner_a = np.einsum("der,dfs->efrs", lora_a, lora_a, dtype=np.float64)
    inner_b = np.einsum("ero,fso->efrs", lora_b, lora_b, dtype=np.float64)
    return np.sum(inner_a * inner_b, axis=(2, 3))


def similar_groups(gram: np.ndarray, number: int) -> list[list[int]]:
    """Merges the two groups with the nearest means repeatedly until `number` groups are left.

    Args:
      gram: inner products of the experts, [E, E].
      number: number of groups, at most E.

    Returns:
      The groups, each in ascending order, sorted by their first expert.
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
    """Inner product of the means of two groups."""
    return float(gram[np.ix_(first, second)].mean())
