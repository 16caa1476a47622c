"""Pictures of a run: how the losses went, and how the tokens spread over the experts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from moe_jax.adapters.sites import expert_name
from moe_jax.training.routing import row_places

_READABLE_ROWS = 40
"""Rows of an expert map up to which they are drawn large."""


def loss_curves(metrics: Path) -> Figure:
    """The training and validation losses over the steps, from a run's `metrics.jsonl`."""
    series: dict[str, list[tuple[int, float]]] = {}
    for text in metrics.read_text(encoding="utf-8").splitlines():
        line: dict[str, Any] = json.loads(text)
        for name, value in line.items():
            if name.endswith("/loss") and value is not None:
                series.setdefault(name.removesuffix("/loss"), []).append((line["step"], value))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        measured = name.startswith("validation/")
        marker, linestyle = ("o", "--") if measured else (None, "-")
        label = name if measured else f"training/{name}"
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, label=label, marker=marker, linestyle=linestyle)
    axes.set(xlabel="step", ylabel="loss (nats per target token)", title="Loss")
    # The untrained base is often ten times worse than what follows and would flatten it.
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if series:
        axes.legend(fontsize="small")
    return figure


def draw_run(metrics: Path, folder: Path) -> list[Path]:
    """Draws a run's losses, and the expert loads of its last line of metrics, into `folder`.

    Args:
      metrics: the run's `metrics.jsonl`.
      folder: gets `loss.png`, and `experts_NAME.png` for each adapter that routes.

    Returns:
      The files that were written.
    """
    figures = {"loss.png": loss_curves(metrics)}
    for text in metrics.read_text(encoding="utf-8").splitlines():
        line: dict[str, Any] = json.loads(text)
        for name, value in line.items():
            adapter, _, kind = name.rpartition("/")
            if kind == "expert_load" and value is not None:
                title = f"Expert load of {adapter!r} in training, up to step {line['step']}"
                load = np.array(value, np.float64)  # None becomes NaN
                figure = expert_map(load, title, adapter, line[f"{adapter}/sites"])
                figures[f"experts_{adapter}.png"] = figure
    for name, figure in figures.items():
        figure.savefig(folder / name)
    return [folder / name for name in figures]


def expert_map(relative: np.ndarray, title: str, adapter: str, sites: Sequence[str]) -> Figure:
    """A heat map of experts' loads.

    Args:
      relative: float [sites * L, E], the load of each expert as a multiple of an equal share; NaN,
        which stays blank, where there is no such expert.
      title: whose load it is.
      adapter: whose experts they are.
      sites: where the routers sit, each with its L layers.
    """
    rows, experts = relative.shape
    dense = rows > _READABLE_ROWS
    figure = Figure(
        figsize=(3.5 + 0.7 * experts, 1.5 + (0.2 if dense else 0.4) * rows), layout="constrained"
    )
    axes = figure.subplots()
    # White is an equal share, so that colour alone tells too much from too little; grey is nothing.
    axes.set_facecolor("0.8")
    image = axes.imshow(relative, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
    size = "xx-small" if dense else "medium"
    for row, expert in np.argwhere(~np.isnan(relative)):
        text = f"{relative[row, expert]:.2f}"
        axes.text(expert, row, text, ha="center", va="center", fontsize=size)
    labels, name = [str(layer) for _, layer in row_places(sites, rows)], "layer"
    if len(sites) > 1:
        labels = [f"{site} {layer}" for site, layer in row_places(sites, rows)]
        name = "router and layer"
    axes.set(xlabel=expert_name(adapter, "INDEX"), ylabel=name, title=title)
    axes.set_xticks(range(experts))
    axes.set_yticks(range(rows), labels, fontsize=size)
    figure.colorbar(image, label="load / equal share", extend="max")
    return figure
