"""What routers did with many tokens, added up; plain numpy, in float64.

All of it is defined on three numbers a token, layer and expert (see `TokenRouting`): the weight,
the router's probability, and the load, which is 1 for a chosen expert, and the weight itself where
all of them share.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_jax.adapters.routing.token_routing import TokenRouting


@dataclasses.dataclass
class Tally:
    """Sums over the tokens of one data set, or of several.

    Attributes:
      rows, tokens: how many.
      routed: bool [L], whether the layer routes at all.
      present: bool [L, E], whether the layer has the expert, and routes.
      load_sum: [L, E], sum of loads: tokens that went to the expert.
      weight_sum: [L, E], sum of weights.
      together_sum: [L, E, E], sum over tokens of the product of the loads of two experts: tokens
        that went to both.
      entropies: float32 [L, T], of the router's distribution at each token, in nats.
    """

    rows: int
    tokens: int
    routed: np.ndarray
    present: np.ndarray
    load_sum: np.ndarray
    weight_sum: np.ndarray
    together_sum: np.ndarray
    entropies: np.ndarray

    @property
    def num_experts(self) -> np.ndarray:
        """How many experts each layer has, [L]; 0 where it does not route."""
        return self.present.sum(axis=-1)

    @property
    def load(self) -> np.ndarray:
        """Each expert's load as a multiple of an equal share, [L, E].

        1 is balance, 0 an expert that no token went to, NaN one that is not there.
        """
        return self._relative(self.load_sum)

    @property
    def weight(self) -> np.ndarray:
        """The same of the weights that experts got, [L, E]."""
        return self._relative(self.weight_sum)

    @property
    def share(self) -> np.ndarray:
        """Each expert's share of the layer's load, [L, E]; NaN for one that is not there."""
        return self.load / np.maximum(self.num_experts, 1)[:, None]

    @property
    def coactivation(self) -> np.ndarray:
        """How often two experts serve the same token, as a multiple of an equal share, [L, E, E].

        The tokens of a pair over the mean of all pairs of the layer: 1 for each pair where every
        two experts are together equally often. NaN on the diagonal, for experts that are not there,
        and in layers where no two serve one token (one expert a token).
        """
        pairs = self.present[:, :, None] & self.present[:, None, :]
        pairs &= ~np.eye(self.present.shape[-1], dtype=bool)
        sums = np.where(pairs, self.together_sum, 0.0)
        mean = sums.sum(axis=(1, 2)) / np.maximum(pairs.sum(axis=(1, 2)), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(pairs & (mean > 0)[:, None, None], sums / mean[:, None, None], np.nan)

    @property
    def together(self) -> np.ndarray:
        """The share of tokens that went to both of two experts, [L, E, E]; NaN as above.

        On the diagonal, the share that went to the expert.
        """
        pairs = self.present[:, :, None] & self.present[:, None, :]
        return np.where(pairs, self.together_sum / max(self.tokens, 1), np.nan)

    @property
    def relative_entropies(self) -> np.ndarray:
        """Each token's entropy over that of a uniform distribution, [L, T]; 0 is certainty.

        NaN in layers that do not route.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.entropies / np.log(np.where(self.routed, self.num_experts, np.nan))[:, None]

    @property
    def entropy(self) -> np.ndarray:
        """Its mean over tokens, [L]."""
        return self.relative_entropies.mean(axis=-1, dtype=np.float64)

    @property
    def dead_experts(self) -> list[tuple[int, int]]:
        """Layer and index of the experts that no token went to."""
        return [(int(a), int(b)) for a, b in np.argwhere(self.present & (self.load_sum == 0))]

    @property
    def imbalance(self) -> np.ndarray:
        """How far each layer's load is from balance: KL(load || equal shares) in bits, [L].

        0 is balance, log2 E one expert for everything.
        """
        share = np.nan_to_num(self.share)
        terms = share * np.log2(np.where(share > 0, share * self.num_experts[:, None], 1.0))
        return np.where(self.routed, terms.sum(axis=-1), np.nan)

    def _relative(self, sums: np.ndarray) -> np.ndarray:
        total = sums.sum(axis=-1, keepdims=True)
        share = sums / np.where(total > 0, total, 1.0)
        return np.where(self.present, share * self.num_experts[:, None], np.nan)


def tally_tokens(routing: TokenRouting, token_mask: np.ndarray) -> Tally:
    """The tally of one batch.

    Args:
      routing: arrays [L, B, S, E], on the host.
      token_mask: bool [B, S], false at padding.
    """
    # Only what is there is looked at, whatever padding holds.
    weights, probabilities, load = (
        np.asarray(field, np.float64)[:, token_mask]  # [L, T, E]
        for field in (routing.weights, routing.probabilities, routing.load)
    )
    routed = np.asarray(routing.routed) > 0
    return Tally(
        rows=int(token_mask.any(axis=-1).sum()),
        tokens=int(token_mask.sum()),
        routed=routed,
        present=(np.asarray(routing.present) > 0) & routed[:, None],
        load_sum=load.sum(axis=1),
        weight_sum=weights.sum(axis=1),
        together_sum=np.einsum("lta,ltb->lab", load, load),
        entropies=entropy(probabilities).astype(np.float32),
    )


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Of distributions over the last axis, in nats; a probability of 0 adds 0."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return np.maximum(-(probabilities * logs).sum(axis=-1), 0.0)


def merged(tallies: Sequence[Tally]) -> Tally:
    """The tally of all tokens of several."""
    first = tallies[0]
    return Tally(
        rows=sum(tally.rows for tally in tallies),
        tokens=sum(tally.tokens for tally in tallies),
        routed=first.routed,
        present=first.present,
        load_sum=sum((tally.load_sum for tally in tallies[1:]), first.load_sum),
        weight_sum=sum((tally.weight_sum for tally in tallies[1:]), first.weight_sum),
        together_sum=sum((tally.together_sum for tally in tallies[1:]), first.together_sum),
        entropies=np.concatenate([tally.entropies for tally in tallies], axis=1),
    )


def specialisation(tallies: Sequence[Tally]) -> np.ndarray:
    """How differently each layer treats data sets, in bits, [L].

    The generalised Jensen-Shannon divergence (Lin 1991, eq. 5.1, equal weights) of their loads:
    what a token's expert says about the data set that it is from, on average, were all equally
    large. 0 where every data set uses the experts alike, and at most log2 of the number of data
    sets. NaN in layers that do not route.
    """
    shares = np.stack([np.nan_to_num(tally.share) for tally in tallies])  # [data, L, E]
    log2 = lambda p: np.log2(np.where(p > 0, p, 1.0))
    mean = shares.mean(axis=0)
    divergence = (shares * log2(shares)).sum(-1).mean(0) - (mean * log2(mean)).sum(-1)
    return np.where(tallies[0].routed, np.maximum(divergence, 0.0), np.nan)


# FIXME docstring of the merged inspection.report:
# """What was seen of an adapter's routers."""


_NAMED = 6
"""Dead experts that the summary names."""


@dataclasses.dataclass(frozen=True)
class RoutedRow:
    """One sequence with what became of each of its tokens.

    Attributes:
      data: the name of its data set.
      where: the place that it came from.
      tokens: int32 [S], the ids.
      pieces: the text of each token.
      weights: float32 [L, S, E], each expert's share of the token's output.
      probabilities: float32 [L, S, E], the router's own, before experts are chosen.
    """

    data: str
    where: str
    tokens: np.ndarray
    pieces: list[str]
    weights: np.ndarray
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class RoutingReport:
    """What the routers of an adapter did with some texts.

    Attributes:
      adapter: its name.
      base: the path of the base.
      method: the adapter's method by name.
      site: where the routers sit in a layer, for example `mlp/moe`.
      sites: all places where this adapter routes.
      data: a tally of each data set, by name.
      rows: the first rows, token by token; see `keep_tokens` of `inspect_routing`.
      notes: one line for each data set on what became of its rows.
    """

    adapter: str
    base: str
    method: str
    site: str
    sites: tuple[str, ...]
    data: dict[str, Tally]
    rows: list[RoutedRow]
    notes: list[str]

    @functools.cached_property
    def total(self) -> Tally:
        """The tally of all tokens."""
        return merged(list(self.data.values()))

    @functools.cached_property
    def specialisation(self) -> np.ndarray | None:
        """See `tally.specialisation`, [L]; None unless there are several data sets."""
        return specialisation(list(self.data.values())) if len(self.data) > 1 else None

    def summary(self) -> list[str]:
        """A few lines for people."""
        total = self.total
        layers, experts = total.present.shape
        layer, expert = np.unravel_index(np.nanargmax(total.load), total.load.shape)
        unequal, entropy = int(np.nanargmax(total.imbalance)), total.entropy
        low, high = int(np.nanargmin(entropy)), int(np.nanargmax(entropy))
        dead = [f"{index} in layer {at}" for at, index in total.dead_experts]
        which = f": {', '.join(dead[:_NAMED])}" if dead else ""
        which += f" and {len(dead) - _NAMED} more" if len(dead) > _NAMED else ""
        sets = f", {len(self.data)} data sets" if len(self.data) > 1 else ""
        load = f"expert {expert} in layer {layer} has {total.load[layer, expert]:.2f} equal shares"
        unbalanced = f"layer {unequal} is the least balanced ({total.imbalance[unequal]:.3f} bits)"
        extremes = f"{entropy[low]:.3f} in layer {low} to {entropy[high]:.3f} in layer {high}"
        lines = [
            f"router    {self.site} of {self.method}, {layers} layers, {experts} experts",
            f"tokens    {total.tokens:,} in {total.rows:,} rows{sets}",
            f"load      {load}, the most; {unbalanced}",
            f"dead      {len(dead)} of {int(total.present.sum())} experts{which}",
            f"entropy   {np.nanmean(entropy):.3f} of a uniform router's on average; {extremes}",
        ]
        if self.specialisation is not None:
            most = int(np.nanargmax(self.specialisation))
            lines.append(
                f"data      most specialised: layer {most}, whose experts say "
                f"{self.specialisation[most]:.3f} bits about the data set "
                f"(all layers: {np.nanmean(self.specialisation):.3f})"
            )
        others = [site for site in self.sites if site != self.site]
        if others:
            lines.append(f"not shown {', '.join(others)}; choose with --site")
        return lines

    def save(self, folder: str | Path) -> list[Path]:
        """Writes pictures, tables and the page; see `moe_jax.inspection.report_files.write_report`."""
        from moe_jax.inspection.report_files import (
            write_report,  # draws, which looking does not need
        )

        return write_report(self, Path(folder))
