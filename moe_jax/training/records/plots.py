"""Figures of a run: loss curves, and heat maps of expert load."""

import collections
import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from moe_jax.adapters.method import AdapterMethod
from moe_jax.config.metric_names import METRICS
from moe_jax.config.preference import PreferenceConfig
from moe_jax.heat_map import MAX_WRITTEN_CELLS, share_norm, write_values
from moe_jax.training.records.metric_lines import read_metrics
from moe_jax.training.records.reward_plots import reward_figures
from moe_jax.training.step.router_metrics import row_locations

_READABLE_ROWS = 16
"""Largest number of rows that an expert map draws in full size."""

_LOG_RANGE = 5.0
"""Ratio of the largest to the smallest loss above which the loss axis is logarithmic."""

_SMOOTHED_POINTS = 20
"""Number of points from which a training loss gets a smoothed curve."""

PER_TOKEN = METRICS["loss"].unit
"""Unit of a language model's loss."""

Series = dict[str, list[tuple[int, float]]]
"""Losses by name, each as pairs of step and value."""


def loss_unit(method: AdapterMethod, preference: PreferenceConfig | None = None) -> str:
    """Unit of the loss of an adapter."""
    if preference is not None:
        return "preference loss per example"
    if method.classification is None:
        return PER_TOKEN
    return "squared error" if method.classification.regression else "nats per row"


def loss_curves(metrics: Path, units: Mapping[str, str] | None = None) -> Figure:
    """Plots training and validation losses over the steps of a run.

    A run with one adapter has a curve for each loss. With several, each adapter has a color, with
    a solid curve for its training loss and a dashed one for the mean of its validation losses.
    Training losses of many points are drawn faintly, under their `moving_average`. An axis whose
    losses span much is logarithmic, so that the first ones do not flatten the rest.

    Args:
      metrics: `metrics.jsonl` of the run.
      units: unit of the losses of each adapter, from `loss_unit`; nats per target token by default.
        Each unit has separate axes.
    """
    return _loss_curves(read_metrics(metrics), units or {})


def _loss_curves(lines: Iterable[dict[str, Any]], units: Mapping[str, str]) -> Figure:
    training, validation = Series(), dict[str, Series]()
    for line in lines:
        for name, value in line.items():
            if not name.endswith("/loss") or value is None:
                continue
            point, parts = (line["step"], value), name.split("/")
            if parts[0] == "validation":
                adapter, data_set = parts[1], "/".join(parts[2:-1])
                validation.setdefault(adapter, {}).setdefault(data_set, []).append(point)
            else:
                training.setdefault("/".join(parts[:-1]), []).append(point)
    several, width = len(training) > 1, _smoothing(max(map(len, training.values()), default=0))
    unit_of = {adapter: units.get(adapter, PER_TOKEN) for adapter in training}
    losses: dict[str, list[float]] = {unit: [] for unit in unit_of.values()} or {PER_TOKEN: [1.0]}
    for adapter, unit in unit_of.items():
        curves = [training[adapter], *validation.get(adapter, {}).values()]
        losses[unit] += [loss for curve in curves for _, loss in curve]
    panels = list(losses)
    height = max(5, 3.5 * len(panels), 0.25 * len(training))
    figure = Figure(figsize=(11 if several else 8, height), layout="constrained")
    stacked = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    axes_of = dict(zip(panels, stacked, strict=True))
    for unit, axes in axes_of.items():
        if min(losses[unit]) > 0 and max(losses[unit]) > _LOG_RANGE * min(losses[unit]):
            _make_logarithmic(axes)
    for number, (adapter, points) in enumerate(training.items()):
        color, axes = f"C{number % 10}", axes_of[unit_of[adapter]]
        sets = validation.get(adapter, {})
        label = adapter if several else f"training/{adapter}"
        _draw_training(axes, points, label, color if several else None, width)
        if several:
            mean = _mean(sets)
            if mean:
                axes.plot(*zip(*mean, strict=True), color=color, marker="o", linestyle="--")
            continue
        for data_set, measured in sets.items():
            label = f"validation/{adapter}/{data_set}"
            axes.plot(*zip(*measured, strict=True), label=label, marker="o", linestyle="--")
    title = "Training loss (solid) and mean validation loss (dashed)" if several else "Loss"
    stacked[0].set_title(title)
    stacked[-1].set_xlabel("step")
    for unit, axes in axes_of.items():
        axes.set_ylabel(f"loss ({unit})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    style: dict[str, Any] = {"fontsize": "small", "title_fontsize": "small", "alignment": "left"}
    if width is not None:
        style["title"] = f"training: moving average\nof {width} points"
    if several:
        figure.legend(loc="outside right upper", **style)
    elif training:
        stacked[0].legend(loc="upper right", **style)
    return figure


def _smoothing(points: int) -> int | None:
    """Points of the moving average of curves of so many points; None draws the losses alone."""
    return None if points < _SMOOTHED_POINTS else max(5, points // 20 | 1)


def _draw_training(
    axes: Axes,
    points: Sequence[tuple[int, float]],
    label: str,
    color: str | None,
    width: int | None,
) -> None:
    steps, losses = zip(*points, strict=True)
    if width is None:
        axes.plot(steps, losses, label=label, color=color, marker="o" if len(points) == 1 else "")
        return
    (raw,) = axes.plot(steps, losses, color=color, alpha=0.3, linewidth=0.8, label="_raw")
    average = moving_average(losses, width, geometric=axes.get_yscale() == "log")
    axes.plot(steps, average, label=label, color=raw.get_color())


def moving_average(values: Sequence[float], width: int, geometric: bool = False) -> np.ndarray:
    """Mean of the values around each one, which does not lag behind them.

    Args:
      values: values at equal distances.
      width: number of values of a mean, odd. Near an end it has as many as are on both sides.
      geometric: True takes the geometric mean.
    """
    numbers = np.log(values) if geometric else np.asarray(values, np.float64)
    sums = np.concatenate([[0.0], np.cumsum(numbers)])
    places = np.arange(len(numbers))
    sides = np.minimum(width // 2, np.minimum(places, places[::-1]))
    means = (sums[places + sides + 1] - sums[places - sides]) / (2 * sides + 1)
    return np.exp(means) if geometric else means


def _make_logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mean(sets: Series) -> list[tuple[int, float]]:
    """Mean over data sets that were measured at the same steps; steps that some lack are left out.

    Those were damaged in the file, since all sets are measured at once.
    """
    values = collections.defaultdict[int, list[float]](list)
    for step, value in (point for points in sets.values() for point in points):
        values[step].append(value)
    full = {step: found for step, found in values.items() if len(found) == len(sets)}
    return [(step, sum(found) / len(found)) for step, found in full.items()]


def draw_run(metrics: Path, folder: Path, units: Mapping[str, str] | None = None) -> list[Path]:
    """Draws the losses and rewards of a run, and the expert loads of its last lines.

    Args:
      metrics: `metrics.jsonl` of the run.
      folder: destination of `loss.png`, of `rewards_NAME.png` for each preference adapter, and of
        `experts_NAME.png` for each adapter that routes.
      units: units of the losses; see `loss_curves`.

    Returns:
      The files that were written.
    """
    lines = read_metrics(metrics)
    figures = {"loss.png": _loss_curves(lines, units or {})}
    for adapter, figure in reward_figures(lines).items():
        figures[f"rewards_{adapter}.png"] = figure
    for adapter, figure in _expert_maps(lines).items():
        figures[f"experts_{adapter}.png"] = figure
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return [folder / name for name in figures]


def adapter_pictures(metrics: Path, adapter: str, unit: str = PER_TOKEN) -> dict[str, bytes]:
    """Draws `loss.png`, `rewards.png` and `experts.png` of one adapter; PNG data by file name.

    There are rewards of preference adapters, and experts of those that route.

    Args:
      metrics: `metrics.jsonl` of the run.
      adapter: name of the adapter.
      unit: unit of its losses; see `loss_unit`.
    """
    prefixes = (f"{adapter}/", f"validation/{adapter}/")
    lines = [
        {k: v for k, v in line.items() if k == "step" or k.startswith(prefixes)}
        for line in read_metrics(metrics)
    ]
    figures = {"loss.png": _loss_curves(lines, {adapter: unit})}
    for figure in reward_figures(lines).values():  # one at most
        figures["rewards.png"] = figure
    for figure in _expert_maps(lines).values():  # one at most
        figures["experts.png"] = figure
    pictures = {}
    for name, figure in figures.items():
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
        pictures[name] = stream.getvalue()
    return pictures


def _expert_maps(lines: Iterable[dict[str, Any]]) -> dict[str, Figure]:
    """Expert maps by adapter, from the last line with its loads; only of adapters that route."""
    last: dict[str, tuple[np.ndarray, str, list[str]]] = {}
    for line in lines:
        for name, value in line.items():
            adapter, _, kind = name.rpartition("/")
            if kind == "expert_load" and value is not None and line.get(f"{adapter}/sites"):
                with contextlib.suppress(ValueError, TypeError):  # damaged, and valid JSON still
                    load = np.array(value, np.float64)  # None becomes NaN
                    title = f"Expert load of {adapter!r}\nin training, up to step {line['step']}"
                    if load.ndim == 2:
                        last[adapter] = load, title, line[f"{adapter}/sites"]
    return {adapter: expert_map(*drawn) for adapter, drawn in last.items()}


def expert_map(relative: np.ndarray, title: str, sites: Sequence[str]) -> Figure:
    """Plots a heat map of expert loads; small maps state the loads as numbers too.

    Args:
      relative: float [sites * L, E], load of each expert as a multiple of an equal share; NaN,
        drawn blank, for an expert that the layer does not have.
      title: title of the figure.
      sites: modules with routers, each with L layers.
    """
    rows, experts = relative.shape
    dense, writes = rows > _READABLE_ROWS, relative.size <= MAX_WRITTEN_CELLS
    figure = Figure(
        figsize=(3.5 + (0.7 if writes else 0.35) * experts, 1.5 + (0.2 if dense else 0.4) * rows),
        layout="constrained",
    )
    axes = figure.subplots()
    # White is an equal share, so that the color tells overload from underload; absent is gray.
    axes.set_facecolor("0.8")
    image = axes.imshow(relative, cmap="RdBu_r", norm=share_norm(relative), aspect="auto")
    size = "x-small" if dense else "medium"
    if writes:
        write_values(axes, image, size)
    labels, name = [str(layer) for _, layer in row_locations(sites, rows)], "layer"
    if len(sites) > 1:
        labels = [f"{site} {layer}" for site, layer in row_locations(sites, rows)]
        name = "router and layer"
    axes.set(xlabel="expert", ylabel=name, title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_yticks(range(rows), labels, fontsize=size)
    figure.colorbar(image, label="load / equal share")
    return figure
