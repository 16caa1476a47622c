"""The page on which each token is coloured by its experts: one file, without server or network.

Its parts are the files in `page/`. The browser is told by a Content-Security-Policy to load nothing
from anywhere and to run no script but the page's own, whatever the texts hold.
"""

import base64
import hashlib
import html
import json
import string
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.inspection.report import RoutingReport
from moe_jax.inspection.tally import entropy

_PARTS = Path(__file__).parent / "page"


def routing_page(report: RoutingReport) -> str:
    """The HTML of a report's rows, their weights rounded to 255ths.

    Raises:
      ValueError: the report kept no row.
    """
    if not report.rows:
        raise ValueError("the report kept no tokens to show; see keep_tokens")
    style, script = _part("page.css"), _part("colours.js") + _part("page.js")
    count = sum(len(row.tokens) for row in report.rows)
    total = report.total
    shown = f"All {count:,} tokens are shown."
    if count < total.tokens:
        each = " of each data set" if len(report.data) > 1 else ""
        shown = (
            f"The first {count:,} of {total.tokens:,} tokens are shown, from the first rows{each}; "
            "loads and means are of all."
        )
    about = (
        f"Adapter {report.adapter} ({report.method}) on {report.base}; routers at {report.site}, "
        f"{len(total.routed)} layers, {total.present.shape[1]} experts."
    )
    return string.Template(_part("page.html")).substitute(
        title=html.escape(f"Experts of {report.adapter}"),
        about=html.escape(about),
        shown=html.escape(shown),
        last_layer=len(total.routed) - 1,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_json(_data(report)),
    )


def _data(report: RoutingReport) -> dict[str, Any]:
    total = report.total
    rows, start = [], 0
    for row in report.rows:
        title = f"{row.data}: {row.where}" if row.where else row.data
        rows.append({"title": title, "start": start, "count": len(row.tokens)})
        start += len(row.tokens)
    weights = np.concatenate([row.weights for row in report.rows], axis=1)  # [L, T, E]
    probabilities = np.concatenate([row.probabilities for row in report.rows], axis=1)
    scale = max(1.0, float(weights.max()))
    entropies = relative_entropy(probabilities, total.num_experts)
    return {
        "layers": weights.shape[0],
        "experts": weights.shape[2],
        "present": ["".join("1" if there else "0" for there in layer) for layer in total.present],
        "load": np.nan_to_num(total.load).round(3).tolist(),
        "entropies": [f"{value:.2f}" for value in np.nan_to_num(total.entropy)],
        "rows": rows,
        "pieces": [piece for row in report.rows for piece in row.pieces],
        "ids": [int(token) for row in report.rows for token in row.tokens],
        "scale": scale,
        "weights": _bytes(_nonzero_bytes(weights / scale)),
        "entropy": _bytes(np.rint(entropies * 255)),
    }


def relative_entropy(probabilities: np.ndarray, num_experts: np.ndarray) -> np.ndarray:
    """Entropy [L, T] of probabilities [L, T, E] over that of a uniform one of [L] experts; 0 where
    there are fewer than two.
    """
    unit = np.log(np.maximum(num_experts, 2))[:, None]
    return np.clip(entropy(probabilities) / unit, 0.0, 1.0)


def _nonzero_bytes(shares: np.ndarray) -> np.ndarray:
    """255ths of shares in [0, 1]; a small one is not rounded to 0, which means no share."""
    return np.where(shares > 0, np.maximum(np.rint(shares * 255), 1), 0)


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.uint8).tobytes()).decode()


def _json(value: Any) -> str:
    """JSON without a character that HTML could take for the end of the script or for a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return (_PARTS / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
