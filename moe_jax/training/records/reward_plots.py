"""Figures of preference training: rewards of chosen and rejected answers, and their accuracy."""

from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_CURVES = {"reward_chosen": "chosen", "reward_rejected": "rejected", "reward_margin": "margin"}
_ACCURACY = "reward_accuracy"

Curves = dict[str, list[tuple[int, float]]]
"""Pairs of step and value by metric."""


def reward_figures(lines: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Figures of the rewards of preference adapters by adapter; none of others.

    The upper axes have the rewards, and the lower ones the accuracy; solid in training, and dashed
    in validation, where each set has curves of its own.

    Args:
      lines: lines of `metrics.jsonl`.
    """
    adapters: dict[str, dict[str, Curves]] = {}
    for line in lines:
        for name, value in line.items():
            place, _, metric = name.rpartition("/")
            if metric not in (*_CURVES, _ACCURACY) or value is None:
                continue
            parts = place.split("/")
            is_held_out = parts[0] == "validation"
            adapter, data_set = (parts[1], "/".join(parts[2:])) if is_held_out else (place, "")
            curves = adapters.setdefault(adapter, {}).setdefault(data_set, {})
            curves.setdefault(metric, []).append((line["step"], value))
    return {adapter: _figure(adapter, sets) for adapter, sets in adapters.items()}


def _figure(adapter: str, sets: Mapping[str, Curves]) -> Figure:
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for data_set, curves in sorted(sets.items()):
        style: dict[str, Any] = {"linestyle": "--", "marker": "o"} if data_set else {}
        place = f" of {data_set}" if data_set else ""
        for color, (metric, title) in enumerate(_CURVES.items()):
            if metric in curves:
                steps, values = zip(*curves[metric], strict=True)
                above.plot(steps, values, label=title + place, color=f"C{color}", **style)
        if _ACCURACY in curves:
            steps, values = zip(*curves[_ACCURACY], strict=True)
            below.plot(steps, values, label=f"accuracy{place}", color="C3", **style)
    above.set_title(f"Rewards of {adapter!r} in training (solid) and validation (dashed)")
    above.set_ylabel("reward")
    below.set(xlabel="step", ylabel="accuracy", ylim=(-0.03, 1.03))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    # Matplotlib takes long to find the best place, and warns of it.
    for axes, place in ((above, "upper left"), (below, "lower right")):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc=place)
    return figure
