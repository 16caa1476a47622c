"""Statistics of the routers of an adapter over many tokens, in NumPy and float64.

All statistics follow from three numbers per token, layer and expert (see `TokenRouting`): the
weight, the router's probability, and the load, which is 1 for a chosen expert, or the weight itself
if all experts serve every token.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from moe_jax.adapters.routing.statistics import TokenRouting

_MAX_DEAD_EXPERTS = 6
"""Number of dead experts that the summary names."""


@dataclasses.dataclass
class RoutingStatistics:
    """Sums over the tokens of one or several data sets: L layers, E experts, T tokens.

    Attributes:
      rows: number of sequences.
      tokens: number of tokens.
      routed: bool [L], true for layers with a router.
      present: bool [L, E], true for experts of layers with a router.
      load_sum: [L, E], sum of loads: the number of tokens of each expert.
      weight_sum: [L, E], sum of weights.
      together_sum: [L, E, E], sum of the products of the loads of two experts: the number of tokens
        that both serve.
      entropies: float32 [L, T], entropy of the router's distribution at each token, in nats.
      weighted_tokens: [L], number of tokens with an expert.
      effective_sum: [L], sum of the effective numbers of experts of these tokens.
    """

    rows: int
    tokens: int
    routed: np.ndarray
    present: np.ndarray
    load_sum: np.ndarray
    weight_sum: np.ndarray
    together_sum: np.ndarray
    entropies: np.ndarray
    weighted_tokens: np.ndarray
    effective_sum: np.ndarray

    @property
    def num_experts(self) -> np.ndarray:
        """Number of experts of each layer, [L]; 0 without a router."""
        return self.present.sum(axis=-1)

    @property
    def load(self) -> np.ndarray:
        """Load of each expert as a multiple of an equal share, [L, E].

        1 is balanced, 0 is an expert without tokens, NaN is an absent expert.
        """
        return self._relative(self.load_sum)

    @property
    def weight(self) -> np.ndarray:
        """Sum of weights of each expert as a multiple of an equal share, [L, E]."""
        return self._relative(self.weight_sum)

    @property
    def share(self) -> np.ndarray:
        """Share of each expert of the load of its layer, [L, E]; NaN for absent experts."""
        return self.load / np.maximum(self.num_experts, 1)[:, None]

    @property
    def coactivation(self) -> np.ndarray:
        """Number of tokens that two experts serve, relative to the mean over pairs, [L, E, E].

        1 for all pairs if every two experts serve equally many tokens together. NaN on the
        diagonal, for absent experts, and in layers with one expert per token.
        """
        pairs = self.present[:, :, None] & self.present[:, None, :]
        pairs &= ~np.eye(self.present.shape[-1], dtype=bool)
        sums = np.where(pairs, self.together_sum, 0.0)
        mean = sums.sum(axis=(1, 2)) / np.maximum(pairs.sum(axis=(1, 2)), 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(pairs & (mean > 0)[:, None, None], sums / mean[:, None, None], np.nan)

    @property
    def together(self) -> np.ndarray:
        """Share of tokens that both of two experts serve, [L, E, E]; NaN for absent experts.

        On the diagonal, the share of tokens that the expert serves.
        """
        pairs = self.present[:, :, None] & self.present[:, None, :]
        return np.where(pairs, self.together_sum / max(self.tokens, 1), np.nan)

    @property
    def relative_entropies(self) -> np.ndarray:
        """Entropy at each token divided by that of a uniform distribution, [L, T].

        0 is a certain router, 1 is a uniform one, NaN is a layer without a router.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.entropies / np.log(np.where(self.routed, self.num_experts, np.nan))[:, None]

    @property
    def entropy(self) -> np.ndarray:
        """Mean of `relative_entropies` over tokens, [L]."""
        return self.relative_entropies.mean(axis=-1, dtype=np.float64)

    @property
    def effective_experts(self) -> np.ndarray:
        """Mean over tokens of 1 / sum over experts of their squared normalized weights, [L].

        1 is one expert with all the weight, k is k experts of equal weight (ReMix,
        arXiv:2603.10160); NaN is a layer without a router. Tokens without an expert do not count.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.effective_sum / np.where(self.routed, self.weighted_tokens, np.nan)

    @property
    def dead_experts(self) -> list[tuple[int, int]]:
        """Layer and index of the experts without tokens."""
        return [(int(a), int(b)) for a, b in np.argwhere(self.present & (self.load_sum == 0))]

    @property
    def imbalance(self) -> np.ndarray:
        """KL divergence of the load from equal shares in bits, [L].

        0 is balanced, log2 E is a single expert that serves all tokens.
        """
        share = np.nan_to_num(self.share)
        terms = share * np.log2(np.where(share > 0, share * self.num_experts[:, None], 1.0))
        return np.where(self.routed, terms.sum(axis=-1), np.nan)

    def _relative(self, sums: np.ndarray) -> np.ndarray:
        total = sums.sum(axis=-1, keepdims=True)
        share = sums / np.where(total > 0, total, 1.0)
        return np.where(self.present, share * self.num_experts[:, None], np.nan)


def batch_statistics(routing: TokenRouting, token_mask: np.ndarray) -> RoutingStatistics:
    """Statistics of one batch.

    Args:
      routing: arrays [L, B, S, E], on the host.
      token_mask: bool [B, S], false at padding.
    """
    # Padding may hold any values, NaN included.
    weights, probabilities, load = (
        np.asarray(field, np.float64)[:, token_mask]  # [L, T, E]
        for field in (routing.weights, routing.probabilities, routing.load)
    )
    routed = np.asarray(routing.routed) > 0
    sums, squares = weights.sum(axis=-1), np.square(weights).sum(axis=-1)
    return RoutingStatistics(
        rows=int(token_mask.any(axis=-1).sum()),
        tokens=int(token_mask.sum()),
        routed=routed,
        present=(np.asarray(routing.present) > 0) & routed[:, None],
        load_sum=load.sum(axis=1),
        weight_sum=weights.sum(axis=1),
        together_sum=np.einsum("lta,ltb->lab", load, load),
        entropies=entropy(probabilities).astype(np.float32),
        weighted_tokens=(sums > 0).sum(axis=-1),
        effective_sum=(sums**2 / np.where(squares > 0, squares, 1.0)).sum(axis=-1),
    )


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy over the last axis, in nats; a probability of 0 adds 0."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return np.maximum(-(probabilities * logs).sum(axis=-1), 0.0)


def merge_statistics(statistics: Sequence[RoutingStatistics]) -> RoutingStatistics:
    """Statistics over the tokens of all of `statistics`."""
    first, *others = statistics
    return RoutingStatistics(
        rows=sum(data_set.rows for data_set in statistics),
        tokens=sum(data_set.tokens for data_set in statistics),
        routed=first.routed,
        present=first.present,
        load_sum=sum((data_set.load_sum for data_set in others), first.load_sum),
        weight_sum=sum((data_set.weight_sum for data_set in others), first.weight_sum),
        together_sum=sum((data_set.together_sum for data_set in others), first.together_sum),
        entropies=np.concatenate([data_set.entropies for data_set in statistics], axis=1),
        weighted_tokens=sum((s.weighted_tokens for s in others), first.weighted_tokens),
        effective_sum=sum((s.effective_sum for s in others), first.effective_sum),
    )


def specialisation(statistics: Sequence[RoutingStatistics]) -> np.ndarray:
    """Divergence of the loads of several data sets in each layer, in bits, [L].

    This is the generalized Jensen-Shannon divergence (Lin 1991, eq. 5.1, equal weights): the mutual
    information between the expert and the data set of a token, if all data sets were equally large.
    0 if every data set has the same loads, at most log2 of the number of data sets, and NaN in
    layers without a router.
    """
    shares = np.stack([np.nan_to_num(data_set.share) for data_set in statistics])  # [data, L, E]
    log2 = lambda p: np.log2(np.where(p > 0, p, 1.0))
    mean = shares.mean(axis=0)
    divergence = (shares * log2(shares)).sum(-1).mean(0) - (mean * log2(mean)).sum(-1)
    return np.where(statistics[0].routed, np.maximum(divergence, 0.0), np.nan)


@dataclasses.dataclass(frozen=True)
class RoutedRow:
    """A sequence of S tokens with the routing of each token.

    Attributes:
      data: name of the data set.
      where: origin of the row, such as a file and line.
      tokens: int32 [S], token ids.
      token_texts: text of each token.
      weights: float32 [L, S, E], weight of each expert in the output of the token.
      probabilities: float32 [L, S, E], probabilities of the router before experts are chosen.
    """

    data: str
    where: str
    tokens: np.ndarray
    token_texts: list[str]
    weights: np.ndarray
    probabilities: np.ndarray


@dataclasses.dataclass(frozen=True)
class RoutingReport:
    """Statistics of the routers of an adapter over data sets.

    Attributes:
      adapter: name of the adapter.
      base: path of the base.
      method: name of the adapter method.
      site: module of the routers in a layer, for example `mlp/moe`.
      sites: all modules of the adapter with a router.
      data: statistics of each data set, by name.
      rows: first rows with the routing of each token; see `InspectionOptions.keep_tokens`.
      notes: one line for each data set with its number of rows and tokens.
    """

    adapter: str
    base: str
    method: str
    site: str
    sites: tuple[str, ...]
    data: dict[str, RoutingStatistics]
    rows: list[RoutedRow]
    notes: list[str]

    @functools.cached_property
    def total(self) -> RoutingStatistics:
        """Statistics over all data sets."""
        return merge_statistics(list(self.data.values()))

    @functools.cached_property
    def specialisation(self) -> np.ndarray | None:
        """Divergence of the loads of the data sets, [L]; None with a single data set."""
        return specialisation(list(self.data.values())) if len(self.data) > 1 else None

    def summary(self) -> list[str]:
        """Lines of text with the main statistics."""
        total = self.total
        layers, experts = total.present.shape
        layer, expert = np.unravel_index(np.nanargmax(total.load), total.load.shape)
        unequal, entropies = int(np.nanargmax(total.imbalance)), total.entropy
        low, high = int(np.nanargmin(entropies)), int(np.nanargmax(entropies))
        effective = total.effective_experts
        fewest, most = int(np.nanargmin(effective)), int(np.nanargmax(effective))
        dead = [f"{index} in layer {layer_index}" for layer_index, index in total.dead_experts]
        dead_names = f": {', '.join(dead[:_MAX_DEAD_EXPERTS])}" if dead else ""
        if len(dead) > _MAX_DEAD_EXPERTS:
            dead_names += f" and {len(dead) - _MAX_DEAD_EXPERTS} more"
        sets = f", {len(self.data)} data sets" if len(self.data) > 1 else ""
        load = f"expert {expert} in layer {layer} has {total.load[layer, expert]:.2f} equal shares"
        unbalanced = f"layer {unequal} is the least balanced ({total.imbalance[unequal]:.3f} bits)"
        span = f"{effective[fewest]:.2f} in layer {fewest} to {effective[most]:.2f} in layer {most}"
        extremes = f"{entropies[low]:.3f} in layer {low} to {entropies[high]:.3f} in layer {high}"
        lines = [
            f"router    {self.site} of {self.method}, {layers} layers, {experts} experts",
            f"tokens    {total.tokens:,} in {total.rows:,} rows{sets}",
            f"load      {load}, the most; {unbalanced}",
            f"dead      {len(dead)} of {int(total.present.sum())} experts{dead_names}",
            f"entropy   {np.nanmean(entropies):.3f} of a uniform router's on average; {extremes}",
            f"effective {np.nanmean(effective):.2f} experts per token on average; {span}",
        ]
        if self.specialisation is not None:
            most = int(np.nanargmax(self.specialisation))
            lines.append(
                f"data      most specialized: layer {most}, whose experts carry "
                f"{self.specialisation[most]:.3f} bits about the data set "
                f"(all layers: {np.nanmean(self.specialisation):.3f})"
            )
        others = [site for site in self.sites if site != self.site]
        if others:
            lines.append(f"not shown {', '.join(others)}; choose with --site")
        return lines
