"""What was seen of an adapter's routers."""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from moe_jax.inspection.tally import Tally, merged, specialisation

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
        """Writes pictures, tables and the page; see `moe_jax.inspection.files.write_report`."""
        from moe_jax.inspection.files import write_report  # draws, which looking does not need

        return write_report(self, Path(folder))
