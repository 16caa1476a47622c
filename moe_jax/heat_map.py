"""Heat maps of loads and other shares, for the figures of training and of inspection."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm

MAX_WRITTEN_CELLS = 16 * 8
"""Largest number of cells whose values are written; smaller ones have no room for text."""

_EQUAL_CONTRAST = 0.179
"""Luminance at which black and white text have the same contrast, in WCAG 2.2's definition."""


def share_norm(values: np.ndarray) -> TwoSlopeNorm:
    """The colors of values relative to a mean of 1, which is in the middle.

    Args:
      values: all values of the figure. The end of the scale is the largest, or 2 if that is more.
    """
    largest = float(np.max(values, where=np.isfinite(values), initial=2.0))
    return TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=largest)


def write_values(axes: Axes, image: Any, size: str) -> None:
    """Writes each cell's value with two digits, in black or white, whichever contrasts more.

    Args:
      axes: axes of the heat map.
      image: result of `axes.imshow`. Cells that are NaN stay blank.
      size: font size.
    """
    values = np.ma.filled(image.get_array().astype(np.float64), np.nan)
    dark = luminance(image.cmap(image.norm(values))) < _EQUAL_CONTRAST
    for row, column in np.argwhere(~np.isnan(values)):
        color = "white" if dark[row, column] else "black"
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": color, "fontsize": size}
        axes.text(column, row, f"{values[row, column]:.2f}", **style)


def luminance(colors: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB colors [..., 3 or 4] in 0 to 1, as WCAG 2.2 defines it."""
    channels = colors[..., :3]
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])
