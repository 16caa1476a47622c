"""Figures of a routing report, for files and notebooks.

Heat maps have the colors of training's: white is balanced, red more, blue less, gray absent.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from moe_jax.heat_map import MAX_WRITTEN_CELLS, share_norm, write_values
from moe_jax.inspection.routing_report import RoutingReport

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito (2008), distinguishable with any color vision."""
_ABSENT_COLOR = "0.8"


def load_map(report: RoutingReport) -> Figure:
    """Load of each expert in each layer, as a multiple of an equal share."""
    load = report.total.load
    layers, experts = load.shape
    height = 0.4 if layers <= 16 else 0.27
    figure = _figure(3.6 + 0.62 * experts, 1.7 + height * layers)
    axes = figure.subplots()
    size = "medium" if layers <= 16 else "small"
    image = _heat(axes, load, size=size if load.size <= MAX_WRITTEN_CELLS else None)
    for layer in np.flatnonzero(~report.total.routed).tolist():
        axes.text((experts - 1) / 2, layer, "no router", ha="center", va="center", fontsize=size)
    axes.set_title(f"Expert load of {report.adapter!r}\nat {report.site}, {_tokens(report)}")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(range(experts))
    axes.set_yticks(range(layers), [str(n) for n in range(layers)], fontsize=size)
    _color_bar(figure, image, axes, "load / equal share")
    return figure


def coactivation_map(report: RoutingReport) -> Figure:
    """Tokens that two experts serve, relative to the mean over pairs; mean over layers."""
    mean = mean_over_layers(report.total.coactivation)
    experts = len(mean)
    figure = _figure(3.4 + 0.62 * experts, 2.2 + 0.55 * experts)
    axes = figure.subplots()
    image = _heat(axes, mean, size="medium" if experts <= 16 else "x-small")
    axes.set_title(
        f"Experts that serve a token together, {report.adapter!r}\n"
        f"at {report.site}, mean over layers, {_tokens(report)}"
    )
    axes.set_aspect("equal")
    axes.set(
        xlabel="expert (gray: with itself)",
        ylabel="expert",
        xticks=range(experts),
        yticks=range(experts),
    )
    if np.isnan(mean).all():
        _write_centered(axes, "one expert per token:\nno pairs")
    _color_bar(figure, image, axes, "tokens with both / mean of all pairs")
    return figure


def coactivation_by_layer(report: RoutingReport) -> Figure:
    """`coactivation_map` of each layer."""
    values = report.total.coactivation
    layers, experts = values.shape[:2]
    columns = min(layers, 8)
    rows = math.ceil(layers / columns)
    side = 1.5 if columns > 4 else 2.1
    figure = _figure(max(1.6 + side * columns, 6.5), 1.5 + (side + 0.25) * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    step = max(1, math.ceil(experts / 8))
    image = None
    for layer, axes in enumerate(grid):
        if layer >= layers:
            axes.set_axis_off()
            continue
        image = _heat(axes, values[layer], size=None, among=values)
        axes.set_title(f"layer {layer}", fontsize="medium")
        axes.set_aspect("equal")
        ticks = range(0, experts, step)
        axes.set_xticks(ticks, [str(n) for n in ticks], fontsize="small")
        axes.set_yticks(ticks, [str(n) for n in ticks], fontsize="small")
        if np.isnan(values[layer]).all():
            _write_centered(axes, "no pairs")
    figure.suptitle(
        f"Experts that serve a token together, {report.adapter!r}, layer by layer\n"
        f"at {report.site}, {_tokens(report)}"
    )
    figure.supxlabel("expert (gray: with itself)")
    figure.supylabel("expert")
    _color_bar(figure, image, list(grid), "tokens with both / mean of all pairs")
    return figure


def entropy_by_layer(report: RoutingReport) -> Figure:
    """Entropy of the routers in each layer: mean and range over tokens, mean of each data set."""
    total = report.total
    layers = np.arange(len(total.routed))
    tokens = total.relative_entropies
    low, high = np.percentile(tokens, [10, 90], axis=1)
    figure = _figure(max(9.0, 5.5 + 0.22 * len(layers)), 4.4)
    axes = figure.subplots()
    axes.fill_between(layers, low, high, color="0.85", label="10th to 90th percentile of tokens")
    if len(report.data) > 1:
        for index, (name, statistics) in enumerate(report.data.items()):
            color, marker = _LINES[index % len(_LINES)], "osD^vP*X"[index % 8]
            style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1}
            axes.plot(layers, statistics.entropy, label=name, **style)
    axes.plot(layers, total.entropy, color="black", marker="o", linewidth=2.5, label="all tokens")
    axes.axhline(1.0, color="0.4", linestyle=":", label="uniform router")
    axes.set(
        xlabel="layer",
        ylabel="router entropy / that of a uniform router",
        ylim=(0.0, 1.05),
        title=f"Router entropy of {report.adapter!r}\nat {report.site}, {_tokens(report)}",
    )
    axes.set_xticks(_layer_ticks(len(layers)))
    counts = set(total.num_experts[total.routed].tolist())
    if len(counts) == 1:  # otherwise the scale in nats would differ between layers
        unit = math.log(counts.pop())
        to_nats, from_nats = lambda y: np.asarray(y) * unit, lambda y: np.asarray(y) / unit
        axes.secondary_yaxis("right", functions=(to_nats, from_nats)).set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def load_by_data(report: RoutingReport) -> Figure:
    """Load of each data set in each layer, and the divergence between the data sets."""
    loads = np.stack([statistics.load for statistics in report.data.values()])  # [data, L, E]
    names = list(report.data)
    count, layers, experts = loads.shape
    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    width, height = max(2.2, 0.34 * experts + 0.5), 0.62 + max(0.28 * count, 1.1)
    longest = max(map(len, names))
    figure = _figure(max(2.6 + width * columns + 0.08 * longest, 7.0), 3.6 + height * rows)
    grid = GridSpec(rows + 1, columns, figure=figure, height_ratios=[2.0, *[height] * rows])
    _bars(figure.add_subplot(grid[0, :]), report)
    image, maps = None, []
    size = "x-small" if experts <= 8 else None
    for layer in range(layers):
        row, column = divmod(layer, columns)
        axes = figure.add_subplot(grid[row + 1, column])
        image = _heat(axes, loads[:, layer], size=size, among=loads)
        axes.set_title(f"layer {layer}", fontsize="medium")
        axes.set_yticks(range(count), names if column == 0 else [""] * count, fontsize="small")
        ticks = range(0, experts, max(1, math.ceil(experts / 8)))
        is_last = layer + columns >= layers
        axes.set_xticks(ticks, [str(n) if is_last else "" for n in ticks], fontsize="small")
        if is_last:
            axes.set_xlabel("expert", fontsize="small")
        maps.append(axes)
    figure.suptitle(
        f"Expert load by data set, {report.adapter!r}\nat {report.site}, {_tokens(report)}"
    )
    _color_bar(figure, image, maps, "load / equal share")
    return figure


def _bars(axes: Axes, report: RoutingReport) -> None:
    divergence = report.specialisation
    if divergence is None:
        _write_centered(axes, "a single data set")
        axes.set_axis_off()
        return
    axes.bar(np.arange(len(divergence)), np.nan_to_num(divergence), color=_LINES[0])
    axes.set(
        xlabel="layer",
        ylabel="bits per token",
        xlim=(-0.6, len(divergence) - 0.4),
        title="Information of a token's expert about its data set "
        f"(at most {math.log2(len(report.data)):.2f} bits)",
    )
    axes.title.set_fontsize("medium")
    axes.set_xticks(_layer_ticks(len(divergence)))
    axes.grid(alpha=0.3, axis="y")


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _heat(
    axes: Axes, values: np.ndarray, *, size: str | None, among: np.ndarray | None = None
) -> Any:
    """Heat map around 1. Cells have their value in font size `size`, unless that is None.

    `among` are all values of a figure of several maps, which share their colors.
    """
    axes.set_facecolor(_ABSENT_COLOR)
    norm = share_norm(values if among is None else among)
    image = axes.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto")
    if size is not None:
        write_values(axes, image, size)
    return image


def _color_bar(figure: Figure, image: Any, axes: Axes | Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, aspect=30)
    largest = image.norm.vmax
    ticks = [0.0, 0.5, 1.0, (1 + largest) / 2, largest]
    bar.set_ticks(ticks, labels=["0", "0.5", "1 balanced", *(f"{t:.3g}" for t in ticks[3:])])
    bar.ax.axhline(1.0, color="black", linewidth=1.5)


def _write_centered(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")


def _tokens(report: RoutingReport) -> str:
    return f"{report.total.tokens:,} tokens"


def _layer_ticks(layers: int) -> list[int]:
    return list(range(0, layers, 1 if layers <= 16 else 2))


def mean_over_layers(values: np.ndarray) -> np.ndarray:
    """Mean over the layers with a value; NaN if no layer has one."""
    is_present = ~np.isnan(values)
    count = is_present.sum(axis=0)
    total = np.where(is_present, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
