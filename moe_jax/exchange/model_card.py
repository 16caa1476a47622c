"""The model card of an export: description, origin, settings, data, metrics and accuracy."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.checkpoints.adapter_files import SavedAdapter
from moe_jax.checkpoints.training_record import PICTURES, DataSet, TrainingRecord
from moe_jax.config.parse import to_plain
from moe_jax.data.hub import hub_address
from moe_jax.exchange.format import ExportOptions, ExportOutcome, Format
from moe_jax.version import __version__

CARD_FILE = "README.md"


def model_card(
    adapter: SavedAdapter,
    options: ExportOptions,
    export_format: Format,
    outcome: ExportOutcome,
    left_out: Sequence[str] = (),
) -> str:
    """The text of the card, with the metadata header of the Hugging Face hub.

    Args:
      adapter: the exported adapter; its `card_pictures` belong beside the card.
      options: options of the export, with its dtype.
      export_format: the format.
      outcome: the result of the export.
      left_out: properties that the format drops or changes, one sentence each.
    """
    name = to_plain(adapter.method)["name"]
    if outcome.is_whole_model:
        title = f"{Path(options.base).name} with a {name} adapter, as one model"
    else:
        title = f"A {name} adapter of {Path(options.base).name}"
    parts = [_header(adapter, options, export_format, outcome), f"# {title}"]
    parts.append(_introduction(adapter, options, outcome))
    code = export_format.loading_code(adapter, options)
    if code:
        parts += ["## How to load it", f"```python\n{code}\n```"]
    parts += ["## Base", _base(adapter, options)]
    method = to_plain(adapter.method)
    parts += ["## Method", _table(("Setting", "Value"), _flat(method))]
    record = adapter.training
    if record is None:
        unknown = "The data, settings and losses of the adapter's training are not recorded."
        parts += ["## Training", unknown]
    else:
        if record.method != method:
            parts.append(
                "The adapter was modified after training. The following sections describe its "
                "training, with this method:"
            )
            parts.append(_table(("Setting", "Value"), _flat(record.method)))
        parts += ["## Training", _table(("Setting", "Value"), _settings(record))]
        parts += ["## Data", _data(record)]
        parts += ["## Metrics", _metrics(record)]
    pictures = [f"![{PICTURES[name]}]({name})" for name in card_pictures(adapter)]
    if pictures:
        parts += ["## Pictures", *pictures]
        if "experts.png" in card_pictures(adapter):
            parts.append(
                "The load of an expert is its share of the routed tokens in training, as a "
                "multiple of an equal share."
            )
    left_out = [*left_out, "Training state: a run cannot be resumed from this export."]
    parts += ["## Limitations", "\n".join(f"- {_sentence(text)}" for text in left_out)]
    return "\n\n".join(parts) + "\n"


def card_pictures(adapter: SavedAdapter) -> dict[str, bytes]:
    """Pictures for the card, by file name; without those of experts that were changed later."""
    record = adapter.training
    changed = record is not None and record.method != to_plain(adapter.method)
    return {k: v for k, v in adapter.pictures.items() if not (changed and k == "experts.png")}


def _header(
    adapter: SavedAdapter, options: ExportOptions, export_format: Format, outcome: ExportOutcome
) -> str:
    """The YAML header; strings and lists are written as JSON, which is valid YAML."""
    fields: dict[str, Any] = {}
    if export_format.library:
        fields["library_name"] = export_format.library
    classifies = adapter.method.classification is not None
    fields["pipeline_tag"] = "text-classification" if classifies else "text-generation"
    if not Path(options.base).expanduser().exists():  # the hub does not know local folders
        fields["base_model"] = options.base
        fields["base_model_relation"] = "finetune" if outcome.is_whole_model else "adapter"
    if adapter.training is not None:
        sets = (*adapter.training.train.values(), *adapter.training.validation.values())
        paths = ", ".join(data.path for data in sets if data.on_hub and data.path).split(", ")
        on_hub = list(dict.fromkeys(map(_data_set_id, filter(None, paths))))
        if on_hub:
            fields["datasets"] = on_hub
    fields["tags"] = ["moe_jax", to_plain(adapter.method)["name"]]
    return "\n".join(["---", *(f"{k}: {json.dumps(v)}" for k, v in fields.items()), "---"])


def _data_set_id(path: str) -> str:
    address = hub_address(path)
    return path if address is None else address.dataset  # a local folder may have the same name


def _introduction(adapter: SavedAdapter, options: ExportOptions, outcome: ExportOutcome) -> str:
    trained = f"was trained on it for {adapter.step} steps"
    if adapter.training is None and adapter.step == 0:
        trained = "has no recorded training steps"
    origin = (
        f"This is {outcome.description} in {options.dtype}, written by moe_jax {__version__} from "
        f"a base and an adapter that {trained}."
    )
    if outcome.approximation is None:
        accuracy = (
            "It is equivalent to the adapter on its base, up to the rounding of its tensors to "
            f"{options.dtype}."
        )
    else:
        accuracy = f"It approximates the adapter on its base: {outcome.approximation}."
    if outcome.divergence is not None and options.tokens is not None:
        accuracy += (
            f"\n\nKL divergence of its next-token distributions from those of the exact model: "
            f"{outcome.divergence:.6g} nats per token, the mean over {options.tokens.size:,} "
            f"tokens of `{options.data_name}`."
        )
    return f"{origin} {accuracy}"


def _base(adapter: SavedAdapter, options: ExportOptions) -> str:
    text = f"`{options.base}`, fingerprint `{adapter.base.fingerprint}`"
    if adapter.training is not None:
        revision, dtype = (adapter.training.base.get(k) for k in ("revision", "param_dtype"))
        text += f", revision `{revision}`" if revision else ""
        text += f", kept in {dtype} during training" if dtype else ""
    return text


def _settings(record: TrainingRecord) -> list[tuple[str, Any]]:
    names = ("batch_size", "micro_batches", "max_length", "packing", "train_on_prompt")
    # A local path is private; the last name is enough.
    start_from = [] if record.start_from is None else [("start_from", Path(record.start_from).name)]
    return [
        *start_from,
        ("steps", record.step),
        *([] if record.step == record.total_steps else [("steps of the run", record.total_steps)]),
        *((name, getattr(record, name)) for name in (*names, "compute_dtype", "seed")),
        *_flat(record.optimizer, "optimizer."),
        *_flat(record.preference or {}, "preference."),
        ("moe_jax", record.package_version),
    ]


def _data(record: TrainingRecord) -> str:
    """A table of the data sets; local paths are private and reduced to their last name."""

    def cells(use: str, name: str, data: DataSet) -> tuple[Any, ...]:
        title = (data if data.on_hub else data.without_local_path()).path
        title = title or f"task {data.task}"
        schema = f"{data.schema} {data.task}" if data.task else data.schema
        rows = "streamed" if data.rows is None else data.rows
        return use, name, title, data.revision, data.split, schema, data.weight, rows

    header = ("Use", "Name", "Data set", "Revision", "Split", "Schema", "Weight", "Rows")
    rows = [cells("training", *item) for item in record.train.items()]
    rows += [cells("validation", *item) for item in record.validation.items()]
    return _table(header, rows)


def _metrics(record: TrainingRecord) -> str:
    sets = record.validation_losses.items()
    rows: list[tuple[str, float | None]] = [("training", record.training_loss)]
    rows += [(f"validation: {name}", loss) for name, loss in sets]
    parts = [_table(("Loss", _unit(record)), [(name, _number(loss)) for name, loss in rows])]
    if record.best_loss is not None:
        parts.append(f"The mean validation loss of the best adapter was {record.best_loss:.4f}.")
    if record.validation_metrics:
        parts.append(_table(("Validation", "Metric", "Value"), _values(record.validation_metrics)))
    if record.accuracies:
        parts.append(f"Evaluation tasks, after step {record.accuracies_step}:")
        parts.append(_table(("Task", "Measure", "Value"), _values(record.accuracies)))
    return "\n\n".join(parts)


def _values(measured: Mapping[str, Mapping[str, float | None]]) -> list[tuple[str, str, str]]:
    """Rows of a table of measured values."""
    return [
        (name, kind, _number(value))
        for name, metrics in measured.items()
        for kind, value in metrics.items()
    ]


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def _unit(record: TrainingRecord) -> str:
    if record.preference is not None:
        return "Preference loss per example"
    classification = record.method.get("classification")
    if classification is None:
        return "Nats per target token"
    return "Mean squared error" if classification["regression"] else "Nats per row"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header)]
    lines += [[str(row[0]), *map(_cell, row[1:])] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].removesuffix(".") + "."


def _flat(mapping: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings of nested groups by their full names."""
    rows = []
    for name, value in mapping.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", value))
    return rows
