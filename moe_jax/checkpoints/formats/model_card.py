"""The README.md of an exported model: where it comes from, and how far it is from it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.formats.format import ExportOptions
from moe_jax.config.registry import to_plain
from moe_jax.version import __version__

CARD = "README.md"


class Outcome(NamedTuple):
    """What came of an export.

    Attributes:
      architecture: transformers' class of the model.
      approximation: in what it departs from the adapter on its base; None if in nothing.
      divergence: KL from the exact model, in nats per token; None if it was not measured.
    """

    architecture: str
    approximation: str | None
    divergence: float | None


def model_card(adapter: SavedAdapter, options: ExportOptions, outcome: Outcome) -> str:
    """The text of the card, with the header that the Hugging Face hub reads."""
    method = to_plain(adapter.method)
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if not Path(options.base).is_dir():  # the hub knows no folders of ours
        header.append(f"base_model: {options.base}")
    header += ["tags:", "- moe_jax", f"- {method['name']}", "---"]
    rows = [f"| {name} | `{json.dumps(value)}` |" for name, value in _flat(method)]
    if outcome.approximation is None:
        faith = (
            "It computes what the adapter computes on its base, but for the rounding of its "
            f"tensors to {options.dtype}."
        )
    else:
        faith = f"It approximates what the adapter computes on its base: {outcome.approximation}."
    if outcome.divergence is not None and options.tokens is not None:
        faith += (
            f"\n\nKL divergence of its next-token distributions from those of the exact model: "
            f"{outcome.divergence:.6g} nats per token, the mean over {options.tokens.size:,} "
            f"tokens of `{options.data_name}`."
        )
    origin = (
        f"A `{outcome.architecture}` in {options.dtype}, written by moe_jax {__version__} from a "
        f"base and an adapter that was trained on it for {adapter.step} steps."
    )
    lines = [
        *header,
        "",
        f"# {Path(options.base).name} with a {method['name']} adapter, as one model",
        "",
        f"{origin} {faith}",
        "",
        "## Base",
        "",
        f"`{options.base}`, fingerprint `{adapter.base.fingerprint}`",
        "",
        "## Adapter",
        "",
        "| Setting | Value |",
        "| --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _flat(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The settings of nested groups, each under its full name."""
    rows = []
    for name, value in mapping.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows
