"""More experts: new ones are split off from those that are there, with a little noise.

A copy of an expert has its pairs and its column of the router, so that both have the same logit for
every token. What that does to the output, without noise:

- Every expert M-fold, and with `top_k` M times as many slots (`times`), is exact: the copies of an
  expert tie, so the chosen ones are all M copies of the experts that were chosen before, and each
  has an M-th of the weight. So it is with `soft`, and with `top_p` 1, where all share. With
  `switch` of straight-through weights and a fixed capacity the first copy serves all.
- Some experts once more (`add`) is exact where one expert serves a token with weight one: `top_k`
  1, and that kind of `switch`. Of two equal logits the first wins.
- Otherwise it is not: of `top_k` 2 the copy takes the place of the second expert, and shares of
  probability go to the copy. No column of a router without bias undoes that: to halve an expert's
  share its logit would have to fall by log 2 for every token.

Noise makes the copies differ, without which training changes them alike for ever.
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
    expert_counts,
    expert_method,
    leaves_of,
    padded,
    rearranged,
    sites_of,
    with_num_experts,
)
from moe_jax.surgery.outcome import SurgeryOutcome, changed_adapter, finished, opened, read_text

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
    """Splits experts; give either `add` or `times`.

    Args:
      adapter: a MixLoRA, LoRAMoE or MoLA, or its folder or hub id.
      add: so many new experts for each router, behind the others.
      times: every expert becomes so many, next to each other; `top_k` becomes so many times larger.
      split: with `add`, the experts that new ones are split off from, one for each; by default
        those that had the most to carry on `data`, whose load is then taken to be shared.
      noise: normal noise on the pairs and the router's column of each new expert, in shares of the
        root mean square of each of these. 0 is none.
      seed: of the noise.
      data: a file of text to measure on; needed where the result is not exact, or without `split`.
      base: the base's folder or hub id, where something is measured; by default the path that the
        adapter was trained with.
      output: where the adapter is written too; does not exist yet, or is empty.

    Raises:
      UserError: the adapter has no experts, or these arguments do not go with it.
    """
    saved = opened(adapter, output)
    former = expert_method(saved)
    counts = expert_counts(former, saved.model.num_layers)
    _check(add, times, split, noise, int(counts.min()))
    fair = _is_exact(former.router, times)
    exact = fair and noise == 0.0
    router = former.router
    if times is not None:
        if isinstance(router, TopKRouter):
            router = dataclasses.replace(router, top_k=times * router.top_k)
        method = with_num_experts(former, lambda number: times * number, router)
    else:
        method = with_num_experts(former, lambda number: number + (add or 0))
    needed = "" if exact else "the result is not exact, and what changes has to be measured"
    if add is not None and not split:
        needed = "without --split, which experts to split has to be measured"
    text = read_text(saved, data, base, needed)
    measuring = None if text is None else text.measuring(saved)

    leaves = leaves_of(saved)
    loads = measuring.loads() if measuring is not None and add is not None and not split else {}
    sources, is_new = {}, {}
    for site in sites_of(leaves):
        lists = [
            _sources(count, add, times, split, loads[site][layer] if loads else None)
            for layer, count in enumerate(counts.tolist())
        ]
        sources[site] = padded([[parent for parent, _ in own] for own in lists])
        # Absent experts are not new, and stay zero.
        is_new[site] = padded([[int(new) for _, new in own] for own in lists]) == 1
    grown = rearranged(leaves, sources)
    rng = np.random.default_rng(seed)
    for site, paths in sites_of(grown).items():
        _add_noise(grown, paths, is_new[site], noise, rng)
    result = changed_adapter(saved, method, grown)
    notes = [_what(counts, add, times, router, sources), _statement(fair, noise)]
    if noise == 0.0:
        notes.append("without noise training changes copies alike; give some before training on")
    change = None
    if text is not None and measuring is not None:
        change = measuring.change_to(result)
        notes.append(text.describe(change, "the adapter as it was"))
    return finished(SurgeryOutcome(result, exact, notes, change), output)


def _check(
    add: int | None, times: int | None, split: Sequence[int], noise: float, fewest: int
) -> None:
    if (add is None) == (times is None):
        raise FieldError("add", "give either `add` or `times`")
    if add is not None and add < 1:
        raise FieldError("add", f"{add}, but it has to be at least 1")
    if times is not None and times < 2:
        raise FieldError("times", f"{times}, but it has to be at least 2")
    if times is not None and split:
        raise FieldError("split", "goes with `add`; with `times` every expert is split")
    if split and len(split) != add:
        raise FieldError("split", f"names {len(split)} experts, but {add} are to be added")
    for expert in split:
        if not 0 <= expert < fewest:
            raise FieldError("split", f"there is no expert {expert}; a layer has 0 to {fewest - 1}")
    if not 0.0 <= noise < 1.0:
        raise FieldError("noise", f"{noise}, but it has to lie in [0, 1)")


def _is_exact(router: Router, times: int | None) -> bool:
    """Whether copies without noise leave the output as it is; see the module's docstring."""
    if isinstance(router, SwitchRouter):
        return router.weights == "straight_through" and router.capacity is not None
    if isinstance(router, TopKRouter):
        return times is not None or router.top_k == 1
    if times is None:
        return False
    return isinstance(router, SoftRouter) or (isinstance(router, TopPRouter) and router.top_p == 1)


def _sources(
    count: int,
    add: int | None,
    times: int | None,
    split: Sequence[int],
    load: np.ndarray | None,
) -> list[tuple[int, bool]]:
    """The experts of a layer: which former one each is, and whether it is a copy."""
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
    leaves: Leaves,
    paths: Sequence[str],
    is_new: np.ndarray,
    noise: float,
    rng: np.random.Generator,
) -> None:
    """Adds noise in place to the pairs and columns of new experts; `is_new` is bool [L, E']."""
    for path in paths:
        name = path.rpartition("/")[2]
        if noise == 0.0 or name == "magnitude":
            continue
        leaf, axis = leaves[path], EXPERT_AXIS[name]
        others = tuple(place for place in range(1, leaf.ndim) if place != axis)
        size = np.sqrt(np.mean(np.square(leaf), axis=others, keepdims=True))
        shape = [1] * leaf.ndim
        shape[0], shape[axis] = is_new.shape
        drawn = rng.standard_normal(leaf.shape) * size * is_new.reshape(shape)
        leaves[path] = (leaf + noise * drawn).astype(leaf.dtype)


def _what(
    counts: np.ndarray,
    add: int | None,
    times: int | None,
    router: Router,
    sources: Mapping[str, np.ndarray],
) -> str:
    if times is not None:
        slots = f", and top_k is {router.top_k} now" if isinstance(router, TopKRouter) else ""
        return f"every expert is {times} experts now{slots}"
    lists = {
        tuple(own[count : count + (add or 0)].tolist())
        for index in sources.values()
        for own, count in zip(index, counts.tolist(), strict=True)
    }
    which = "the most used of each layer" if len(lists) > 1 else ", ".join(map(str, *lists))
    return f"each router has {add} more experts, split off from {which}"


def _statement(fair: bool, noise: float) -> str:
    if not fair:
        return "not exact: copies take slots or probability from other experts"
    if noise > 0.0:
        return f"not exact: new experts differ by noise of {noise:g} from those they were split off"
    return "exact, up to rounding: copies share what the expert that they are of had"
