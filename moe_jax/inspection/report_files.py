"""A report as a folder: pictures, tables, one JSON with everything, and the page."""

import base64
import csv
import hashlib
import html
import json
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.adapters.tree import expert_name
from moe_jax.files.folders import new_folder
from moe_jax.inspection import routing_plots as plots
from moe_jax.inspection.routing_report import RoutingReport, Tally, entropy
from moe_jax.version import __version__

_DIGITS = 6
_FORMAT_VERSION = 1

Table = Iterator[Mapping[str, Any]]


def write_report(report: RoutingReport, folder: Path) -> list[Path]:
    """Writes a folder that appears when all of it is there.

    `load`, `coactivation` and `entropy`, each a `.png` and a `.csv` (and
    `coactivation_by_layer.png`); with several data sets `load_by_data`; `routing.json`; and, if
    tokens were kept, `tokens.html`.

    Args:
      report: what was seen.
      folder: does not exist yet, or is empty.

    Returns:
      The files.

    Raises:
      CheckpointError: the folder is not empty, or the disk is full or not writable.
    """
    content = json.dumps(as_json(report), indent=1, allow_nan=False)
    page = routing_page(report) if report.rows else None
    figures = {
        "load.png": plots.load_map,
        "coactivation.png": plots.coactivation_map,
        "coactivation_by_layer.png": plots.coactivation_by_layer,
        "entropy.png": plots.entropy_by_layer,
    }
    tables = {
        "load.csv": _load_table(report),
        "coactivation.csv": _coactivation_table(report),
        "entropy.csv": _entropy_table(report),
    }
    if len(report.data) > 1:
        figures["load_by_data.png"] = plots.load_by_data
        tables["load_by_data.csv"] = _data_table(report)
    pictures = 2**20 * len(figures)
    with new_folder(folder, 3 * len(content) + len(page or "") + pictures) as unfinished:
        for name, draw in figures.items():
            draw(report).savefig(unfinished / name)
        for name, table in tables.items():
            _write_table(unfinished / name, table)
        (unfinished / "routing.json").write_text(content + "\n", encoding="utf-8")
        if page is not None:
            (unfinished / "tokens.html").write_text(page, encoding="utf-8")
        names = sorted(path.name for path in unfinished.iterdir())
    return [folder / name for name in names]


def as_json(report: RoutingReport) -> dict[str, Any]:
    """All numbers of a report, without its single tokens; None is what is not there."""
    total, told = report.total, report.specialisation
    return {
        "format_version": _FORMAT_VERSION,
        "package_version": __version__,
        "adapter": report.adapter,
        "base": report.base,
        "method": report.method,
        "site": report.site,
        "sites": list(report.sites),
        "notes": report.notes,
        "summary": report.summary(),
        "rows": total.rows,
        "tokens": total.tokens,
        "layers": len(total.routed),
        "experts": total.present.shape[1],
        "routed": total.routed.tolist(),
        "dead_experts": [{"layer": at, "expert": expert} for at, expert in total.dead_experts],
        **_numbers(total),
        "coactivation": _plain(total.coactivation),
        "mean_coactivation": _plain(plots.mean_over_layers(total.coactivation)),
        "tokens_with_both": _plain(total.together),
        "specialisation_bits": None if told is None else _plain(told),
        "data": {
            name: {"rows": tally.rows, "tokens": tally.tokens, **_numbers(tally)}
            for name, tally in report.data.items()
        },
    }


def _numbers(tally: Tally) -> dict[str, Any]:
    low, middle, high = np.percentile(tally.relative_entropies, [10, 50, 90], axis=1)
    return {
        "load": _plain(tally.load),
        "weight": _plain(tally.weight),
        "imbalance_bits": _plain(tally.imbalance),
        "entropy": {
            "mean": _plain(tally.entropy),
            "mean_nats": _plain(np.where(tally.routed, tally.entropies.mean(axis=1), np.nan)),
            "percentile_10": _plain(low),
            "median": _plain(middle),
            "percentile_90": _plain(high),
        },
    }


def _load_table(report: RoutingReport) -> Table:
    total = report.total
    for layer, expert in np.argwhere(total.present):
        yield {
            "layer": layer,
            "expert": expert,
            "name": expert_name(report.adapter, int(expert)),
            "load": total.load[layer, expert],
            "share": total.share[layer, expert],
            "weight": total.weight[layer, expert],
        }


def _coactivation_table(report: RoutingReport) -> Table:
    """Each pair once; the mean over layers first."""
    total = report.total
    experts = total.present.shape[1]
    pairs = [(a, b) for a in range(experts) for b in range(a + 1, experts)]
    mean = plots.mean_over_layers(total.coactivation)
    for a, b in pairs:
        yield {
            "layer": "mean",
            "expert_a": a,
            "expert_b": b,
            "coactivation": mean[a, b],
            "tokens_with_both": plots.mean_over_layers(total.together)[a, b],
        }
    for layer in np.flatnonzero(total.routed):
        for a, b in pairs:
            yield {
                "layer": layer,
                "expert_a": a,
                "expert_b": b,
                "coactivation": total.coactivation[layer, a, b],
                "tokens_with_both": total.together[layer, a, b],
            }


def _entropy_table(report: RoutingReport) -> Table:
    sets = {"": report.total, **(report.data if len(report.data) > 1 else {})}
    for name, tally in sets.items():
        numbers = _numbers(tally)["entropy"]
        for layer in np.flatnonzero(tally.routed):
            values = {key: column[layer] for key, column in numbers.items()}
            yield {"data": name or "all", "layer": layer, **values}


def _data_table(report: RoutingReport) -> Table:
    told = report.specialisation
    assert told is not None
    for name, tally in report.data.items():
        for layer, expert in np.argwhere(tally.present):
            yield {
                "data": name,
                "layer": layer,
                "expert": expert,
                "load": tally.load[layer, expert],
                "share": tally.share[layer, expert],
                "weight": tally.weight[layer, expert],
                "layer_specialisation_bits": told[layer],
            }


def _write_table(file: Path, table: Table) -> None:
    rows = list(table)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    """Rounded as in the JSON; empty where there is nothing."""
    plain = _plain(value) if isinstance(value, float | np.floating) else value
    return "" if plain is None else plain


def _plain(values: Any) -> Any:
    """Nested lists of rounded numbers, None for NaN."""
    if isinstance(values, np.ndarray | Sequence):
        return [_plain(value) for value in values]
    return None if math.isnan(values) else round(float(values), _DIGITS)


# FIXME docstring of the merged inspection.page_writer:
# """The page on which each token is coloured by its experts: one file, without server or network.
#
# Its parts are the files in `page/`. The browser is told by a Content-Security-Policy to load nothing
# from anywhere and to run no script but the page's own, whatever the texts hold.
# """


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
