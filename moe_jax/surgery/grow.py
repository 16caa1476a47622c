"""Adds experts: new experts are copies of existing ones with a little noise.

A copy of an expert has the same pairs and the same router column, so both have equal logits for
every token. The effect on the output without noise:

- Replacing each expert by M copies (`times`), with `top_k` multiplied by M, is exact. The copies of
  an expert tie, so all M copies of the formerly chosen experts are chosen, each with 1/M of the
  weight. The same holds for `soft` and for `top_p` 1, where all experts share. With `switch` with
  straight-through weights and a fixed capacity, the first copy serves all tokens.
- Copying some experts once (`add`) is exact if one expert serves a token with weight one: `top_k`
  1, and `switch` as above. The first of two equal logits wins.
- Otherwise the result is not exact. With `top_k` 2 the copy displaces the second expert, and
  otherwise it takes a share of probability. No router column without a bias avoids this: halving an
  expert's share needs a logit that is lower by log 2 for every token.

Noise makes the copies differ. Without it they get equal gradients and stay equal.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moe_jax.adapters.routing import SoftRouter, SwitchRouter, TopKRouter, TopPRouter
from moe_jax.adapters.routing.router import Router
from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.config.parse import FieldError
from moe_jax.surgery.experts import (
    EXPERT_AXIS,
    Leaves,
    adapter_leaves,
    expert_counts,
    expert_method,
    gather_experts,
    padded_experts,
    routed_sites,
    with_num_experts,
)
from moe_jax.surgery.outcome import (
    SurgeryOutcome,
    changed_adapter,
    open_adapter,
    read_text,
    save_outcome,
)

DEFAULT_NOISE = 0.01


def grow(
    adapter: SavedAdapter | str | Path,
    *,
    add: int | None = None,
    times: int | None = None,
    split: Sequence[int] = (),
    noise: float = DEFAULT_NOISE,
    seed: int = 0,
    data: str | Path | None = None,
    base: str | Path | None = None,
    output: str | Path | None = None,
) -> SurgeryOutcome:
    """Splits experts into copies; give either `add` or `times`.

    Args:
      adapter: a MixLoRA, LoRAMoE or MoLA, or its folder or hub id.
      add: number of new experts of each router, appended to the others.
      times: number of adjacent copies that replace each expert; `top_k` is multiplied by it.
      split: with `add`, the experts to copy, one for each new expert; by default those with the
        highest load on `data`, where copies share the load.
      noise: standard deviation of normal noise on the pairs and the router column of each new
        expert, relative to the root mean square of each; 0 for no noise.
      seed: seed of the noise.
      data: a text file to measure on; required if the result is not exact, or without `split`.
      base: folder or hub id of the base, used for measuring; by default the path that the adapter
        was trained with.
      output: a folder for the adapter; does not exist, or is empty.

    Raises:
      UserError: the adapter has no experts, or an argument is invalid for it.
    """
    saved = open_adapter(adapter, output)
    former = expert_method(saved)
    counts = expert_counts(former, saved.model.num_layers)
    _check(add, times, split, noise, int(counts.min()))
    copies_are_exact = _is_exact(former.router, times)
    exact = copies_are_exact and noise == 0.0
    router = former.router
    if times is not None:
        if isinstance(router, TopKRouter):
            router = dataclasses.replace(router, top_k=times * router.top_k)
        method = with_num_experts(former, lambda number: times * number, router)
    else:
        method = with_num_experts(former, lambda number: number + (add or 0))
    needed = "" if exact else "the result is not exact, so the change has to be measured"
    if add is not None and not split:
        needed = "without --split, the load of experts has to be measured"
    text = read_text(saved, data, base, needed)
    measurement = None if text is None else text.measurement(saved)

    leaves = adapter_leaves(saved)
    loads = measurement.loads() if measurement is not None and add is not None and not split else {}
    sources, is_new = {}, {}
    for site in routed_sites(leaves):
        lists = [
            _sources(count, add, times, split, loads[site][layer] if loads else None)
            for layer, count in enumerate(counts.tolist())
        ]
        sources[site] = padded_experts([[parent for parent, _ in layer] for layer in lists])
        # Absent experts are not new and stay zero.
        is_new[site] = padded_experts([[int(new) for _, new in layer] for layer in lists]) == 1
    grown = gather_experts(leaves, sources)
    rng = np.random.default_rng(seed)
    for site, paths in routed_sites(grown).items():
        _add_noise(grown, paths, is_new[site], noise, rng)
    result = changed_adapter(saved, method, grown)
    notes = [_summary(counts, add, times, router, sources), _statement(copies_are_exact, noise)]
    if noise == 0.0:
        notes.append("without noise copies stay equal in training; add noise before training on")
    change = None
    if text is not None and measurement is not None:
        change = measurement.logit_change_to(result)
        notes.append(text.describe(change, "the original adapter"))
    return save_outcome(SurgeryOutcome(result, exact, notes, change), output)


def _check(
    add: int | None, times: int | None, split: Sequence[int], noise: float, fewest: int
) -> None:
    if (add is None) == (times is None):
        raise FieldError("add", "give either `add` or `times`")
    if add is not None and add < 1:
        raise FieldError("add", f"{add}, but must be at least 1")
    if times is not None and times < 2:
        raise FieldError("times", f"{times}, but must be at least 2")
    if times is not None and split:
        raise FieldError("split", "requires `add`; with `times` every expert is split")
    if split and len(split) != add:
        raise FieldError("split", f"{len(split)} experts for {add} new ones; give as many")
    for expert in split:
        if not 0 <= expert < fewest:
            raise FieldError("split", f"there is no expert {expert}; a layer has 0 to {fewest - 1}")
    if not 0.0 <= noise < 1.0:
        raise FieldError("noise", f"{noise}, but must lie in [0, 1)")


def _is_exact(router: Router, times: int | None) -> bool:
    """True if copies without noise do not change the output; see the module docstring."""
    if isinstance(router, SwitchRouter):
        return router.weights == "straight_through" and router.capacity is not None
    if isinstance(router, TopKRouter):
        return times is not None or router.top_k == 1
    if times is None:
        return False
    return isinstance(router, SoftRouter) or (isinstance(router, TopPRouter) and router.top_p == 1)


def _sources(
    count: int, add: int | None, times: int | None, split: Sequence[int], load: np.ndarray | None
) -> list[tuple[int, bool]]:
    """The experts of a new layer: index of the former expert, and True for a copy."""
    if times is not None:
        return [(expert, copy > 0) for expert in range(count) for copy in range(times)]
    parents = list(split)
    if load is not None:
        copies = np.ones(count)
        for _ in range(add or 0):
            parents.append(int(np.argmax(load[:count] / copies)))
            copies[parents[-1]] += 1
    return [*((expert, False) for expert in range(count)), *((parent, True) for parent in parents)]


def _add_noise(
    leaves: Leaves, paths: Sequence[str], is_new: np.ndarray, noise: float, rng: np.random.Generator
) -> None:
    """Adds noise in place to pairs and router columns of new experts; `is_new` is bool [L, E']."""
    for path in paths:
        name = path.rpartition("/")[2]
        if noise == 0.0 or name == "magnitude":
            continue
        leaf, axis = leaves[path], EXPERT_AXIS[name]
        others = tuple(other for other in range(1, leaf.ndim) if other != axis)
        scale = np.sqrt(np.mean(np.square(leaf), axis=others, keepdims=True))
        shape = [1] * leaf.ndim
        shape[0], shape[axis] = is_new.shape
        change = rng.standard_normal(leaf.shape) * scale * is_new.reshape(shape)
        leaves[path] = (leaf + noise * change).astype(leaf.dtype)


def _summary(
    counts: np.ndarray,
    add: int | None,
    times: int | None,
    router: Router,
    sources: Mapping[str, np.ndarray],
) -> str:
    if times is not None:
        top_k = f"; top_k is now {router.top_k}" if isinstance(router, TopKRouter) else ""
        return f"every expert was replaced by {times} copies{top_k}"
    lists = {
        tuple(layer[count : count + (add or 0)].tolist())
        for index in sources.values()
        for layer, count in zip(index, counts.tolist(), strict=True)
    }
    parents = "the most used of each layer" if len(lists) > 1 else ", ".join(map(str, *lists))
    return f"each router has {add} more experts, copies of {parents}"


def _statement(copies_are_exact: bool, noise: float) -> str:
    if not copies_are_exact:
        return "not exact: copies take tokens or probability from other experts"
    if noise > 0.0:
        return f"not exact: new experts differ from their originals by noise of {noise:g}"
    return "exact, up to rounding: copies share the weight of their original"
