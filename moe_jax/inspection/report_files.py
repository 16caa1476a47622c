"""Files of a routing report: figures, tables, JSON, and an HTML page with the experts of tokens.

The page is a single file that loads nothing. Its Content-Security-Policy forbids all requests and
all scripts but its own, whatever the texts contain. Its sources are in `page/`.
"""

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
from moe_jax.inspection import routing_plots
from moe_jax.inspection.routing_report import RoutingReport, RoutingStatistics, entropy
from moe_jax.version import __version__

_DIGITS = 6
_REPORT_FORMAT_VERSION = 1
_PAGE_SOURCES = Path(__file__).parent / "page"

Table = Iterator[Mapping[str, Any]]


def save_routing_report(report: RoutingReport, folder: str | Path) -> list[Path]:
    """Writes a report into a folder that appears once it is complete.

    The files are `load`, `coactivation` and `entropy`, each as `.png` and `.csv`;
    `coactivation_by_layer.png`; with several data sets `load_by_data`; `routing.json`; and, if the
    report has rows, `tokens.html`.

    Args:
      report: result of `moe_jax.inspect_routing`.
      folder: a folder that is empty or does not exist.

    Returns:
      Paths of the files.

    Raises:
      CheckpointError: the folder is not empty, or the disk is full or not writable.
    """
    folder = Path(folder)
    content = json.dumps(as_json(report), indent=1, allow_nan=False)
    page = routing_page(report) if report.rows else None
    figures = {
        "load.png": routing_plots.load_map,
        "coactivation.png": routing_plots.coactivation_map,
        "coactivation_by_layer.png": routing_plots.coactivation_by_layer,
        "entropy.png": routing_plots.entropy_by_layer,
    }
    tables = {
        "load.csv": _load_table(report),
        "coactivation.csv": _coactivation_table(report),
        "entropy.csv": _entropy_table(report),
    }
    if len(report.data) > 1:
        figures["load_by_data.png"] = routing_plots.load_by_data
        tables["load_by_data.csv"] = _data_table(report)
    figure_bytes = 2**20 * len(figures)
    with new_folder(folder, 3 * len(content) + len(page or "") + figure_bytes) as unfinished:
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
    """Content of `routing.json`: all statistics, without single tokens. Absent values are None."""
    total, divergence = report.total, report.specialisation
    return {
        "format_version": _REPORT_FORMAT_VERSION,
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
        "dead_experts": [{"layer": layer, "expert": index} for layer, index in total.dead_experts],
        **_numbers(total),
        "coactivation": _plain(total.coactivation),
        "mean_coactivation": _plain(routing_plots.mean_over_layers(total.coactivation)),
        "tokens_with_both": _plain(total.together),
        "specialisation_bits": None if divergence is None else _plain(divergence),
        "data": {
            name: {"rows": part.rows, "tokens": part.tokens, **_numbers(part)}
            for name, part in report.data.items()
        },
    }


def _numbers(statistics: RoutingStatistics) -> dict[str, Any]:
    low, median, high = np.percentile(statistics.relative_entropies, [10, 50, 90], axis=1)
    nats = np.where(statistics.routed, statistics.entropies.mean(axis=1), np.nan)
    return {
        "load": _plain(statistics.load),
        "weight": _plain(statistics.weight),
        "imbalance_bits": _plain(statistics.imbalance),
        "effective_experts": _plain(statistics.effective_experts),
        "entropy": {
            "mean": _plain(statistics.entropy),
            "mean_nats": _plain(nats),
            "percentile_10": _plain(low),
            "median": _plain(median),
            "percentile_90": _plain(high),
        },
    }


def _expert_numbers(statistics: RoutingStatistics, layer: int, expert: int) -> dict[str, Any]:
    return {
        "load": statistics.load[layer, expert],
        "share": statistics.share[layer, expert],
        "weight": statistics.weight[layer, expert],
    }


def _load_table(report: RoutingReport) -> Table:
    for layer, expert in np.argwhere(report.total.present):
        name = expert_name(report.adapter, int(expert))
        numbers = _expert_numbers(report.total, layer, expert)
        yield {"layer": layer, "expert": expert, "name": name, **numbers}


def _coactivation_table(report: RoutingReport) -> Table:
    """Each pair once; first the mean over layers, then every layer."""
    total = report.total
    experts = total.present.shape[1]
    mean = routing_plots.mean_over_layers
    sections = [("mean", mean(total.coactivation), mean(total.together))]
    sections += [
        (i, total.coactivation[i], total.together[i]) for i in np.flatnonzero(total.routed)
    ]
    for layer, coactivation, together in sections:
        for a in range(experts):
            for b in range(a + 1, experts):
                yield {
                    "layer": layer,
                    "expert_a": a,
                    "expert_b": b,
                    "coactivation": coactivation[a, b],
                    "tokens_with_both": together[a, b],
                }


def _entropy_table(report: RoutingReport) -> Table:
    sets = {"": report.total, **(report.data if len(report.data) > 1 else {})}
    for name, statistics in sets.items():
        numbers = _numbers(statistics)["entropy"]
        for layer in np.flatnonzero(statistics.routed):
            values = {key: column[layer] for key, column in numbers.items()}
            values["effective_experts"] = statistics.effective_experts[layer]
            yield {"data": name or "all", "layer": layer, **values}


def _data_table(report: RoutingReport) -> Table:
    divergence = report.specialisation
    assert divergence is not None
    for name, statistics in report.data.items():
        for layer, expert in np.argwhere(statistics.present):
            yield {
                "data": name,
                "layer": layer,
                "expert": expert,
                **_expert_numbers(statistics, layer, expert),
                "layer_specialisation_bits": divergence[layer],
            }


def _write_table(file: Path, table: Table) -> None:
    rows = list(table)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    """Value rounded as in the JSON; empty for NaN."""
    plain = _plain(value) if isinstance(value, float | np.floating) else value
    return "" if plain is None else plain


def _plain(values: Any) -> Any:
    """Nested lists of rounded numbers, None for NaN."""
    if isinstance(values, np.ndarray | Sequence):
        return [_plain(value) for value in values]
    return None if math.isnan(values) else round(float(values), _DIGITS)


def routing_page(report: RoutingReport) -> str:
    """HTML page of the report's rows. Weights are rounded to multiples of 1/255.

    Raises:
      ValueError: the report has no rows.
    """
    if not report.rows:
        raise ValueError("the report has no tokens to show; set InspectionOptions.keep_tokens")
    style = _page_source("tokens.css") + _page_source("page.css")
    script = "".join(_page_source(name) for name in ("colors.js", "token_view.js", "page.js"))
    count = sum(len(row.tokens) for row in report.rows)
    total = report.total
    shown = f"All {count:,} tokens are shown."
    if count < total.tokens:
        per_data_set = " of each data set" if len(report.data) > 1 else ""
        shown = (
            f"The first {count:,} of {total.tokens:,} tokens are shown, from the first rows"
            f"{per_data_set}; loads and means are over all tokens."
        )
    about = (
        f"Adapter {report.adapter} ({report.method}) on {report.base}; routers at {report.site}, "
        f"{len(total.routed)} layers, {total.present.shape[1]} experts."
    )
    return string.Template(_page_source("page.html")).substitute(
        title=html.escape(f"Experts of {report.adapter}"),
        about=html.escape(about),
        shown=html.escape(shown),
        last_layer=len(total.routed) - 1,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_html_safe_json(_page_data(report)),
    )


def _page_data(report: RoutingReport) -> dict[str, Any]:
    total = report.total
    rows, start = [], 0
    for row in report.rows:
        title = f"{row.data}: {row.where}" if row.where else row.data
        rows.append({"title": title, "start": start, "count": len(row.tokens)})
        start += len(row.tokens)
    weights = np.concatenate([row.weights for row in report.rows], axis=1)  # [L, T, E]
    probabilities = np.concatenate([row.probabilities for row in report.rows], axis=1)
    scale = max(1.0, float(weights.max()))
    shares = weights / scale * 255
    uniform = np.log(np.maximum(total.num_experts, 2))[:, None]  # entropy 0 with a single expert
    entropies = np.clip(entropy(probabilities) / uniform, 0.0, 1.0)
    return {
        "layers": weights.shape[0],
        "experts": weights.shape[2],
        "present": ["".join("1" if is_in else "0" for is_in in layer) for layer in total.present],
        "load": np.nan_to_num(total.load).round(3).tolist(),
        "entropies": [f"{value:.2f}" for value in np.nan_to_num(total.entropy)],
        "rows": rows,
        "texts": [text for row in report.rows for text in row.token_texts],
        "ids": [int(token) for row in report.rows for token in row.tokens],
        "scale": scale,
        # Positive shares stay positive: 0 means not chosen.
        "weights": _base64_bytes(np.where(weights > 0, np.maximum(np.rint(shares), 1), 0)),
        "entropy": _base64_bytes(np.rint(entropies * 255)),
    }


def _base64_bytes(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(np.uint8).tobytes()).decode()


def _html_safe_json(value: Any) -> str:
    """JSON that HTML cannot mistake for the end of the script or for a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _page_source(name: str) -> str:
    return (_PAGE_SOURCES / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
