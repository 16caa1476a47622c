"""Reports on adapters: `training.json`, and the table that ranks them."""

import json
import math

import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.training.records.metric_lines import METRICS_FILE, read_metrics
from moe_jax.training.records.metric_log import training_losses
from moe_jax.training.run.adapter_reports import (
    TABLE_FILES,
    AdapterReport,
    adapter_reports,
    data_set_record,
    table_lines,
    write_table,
)
from moe_jax.training.run.inputs import Progress


@pytest.mark.parametrize(
    ("fields", "folder", "path", "on_hub"),
    [
        ({"task": "arc_easy"}, None, "allenai/ai2_arc", True),
        ({"task": "arc_easy"}, "{here}", "{here}/arc_easy", False),
        ({"task": "arc_easy", "path": "{here}/rows.jsonl"}, None, "{here}/rows.jsonl", False),
        ({"path": "owner/rows", "schema": "text"}, None, "owner/rows", True),
        ({"path": "{here}/rows.jsonl", "schema": "text"}, None, "{here}/rows.jsonl", False),
        ({"path": "rows*.jsonl", "schema": "text"}, None, "rows*.jsonl", False),
        (
            {"path": "hf://datasets/a/b/x.csv", "schema": "text"},
            None,
            "hf://datasets/a/b/x.csv",
            True,
        ),
        (
            {"path": ("hf://datasets/a/b", "x.csv"), "schema": "text"},
            None,
            "hf://datasets/a/b, x.csv",
            False,
        ),
    ],
)
def test_origin_of_a_data_set(tmp_path, fields, folder, path, on_hub):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "rows.jsonl").touch()
    fields = {k: v.format(here=tmp_path) if isinstance(v, str) else v for k, v in fields.items()}
    folder = None if folder is None else str(tmp_path)
    record = data_set_record(SourceConfig(**fields), 7, folder)
    assert (record.path, record.on_hub, record.rows) == (path.format(here=tmp_path), on_hub, 7)


@pytest.mark.parametrize(
    "validation", [{}, {"bad/held_out": math.nan, "good/held_out": 1.8}], ids=["without", "with"]
)
def test_a_diverged_adapter_ranks_last(tmp_path, validation):
    lines = [
        {"step": 1, "bad/loss": 1.5, "good/loss": 2.0},
        {"step": 2, "bad/loss": None, "good/loss": 1.8},  # not finite
    ]
    metrics = tmp_path / METRICS_FILE
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    progress = Progress(2, validation, {})
    reports = adapter_reports({"bad": 2, "good": 2}, progress, tmp_path, metrics)
    assert list(reports) == ["good", "bad"]

    write_table(tmp_path, list(reports.values()))
    (good, bad) = json.loads((tmp_path / TABLE_FILES[0]).read_text())
    assert (good["adapter"], good["training_loss"]) == ("good", 1.8)
    assert (bad["adapter"], bad["training_loss"], bad["validation_loss"]) == ("bad", None, None)
    # The losses that the recorder puts into `training.json`.
    losses = training_losses(read_metrics(metrics))
    assert losses == {name: report.training_loss for name, report in reports.items()}


def report(name, validation, training_loss):
    return AdapterReport(name, 5, None, validation, training_loss, None, None)


def test_sort_keys_by_hand():
    assert report("x", {"a": 1.0, "b": 4.0}, 9.0).order == 2.5
    assert report("x", {}, 3.0).order == 3.0
    assert report("x", {}, None).order == float("inf")
    assert report("x", {"a": float("nan")}, 1.0).order == float("inf")


def test_the_table_by_hand(tmp_path):
    reports = [report("first", {"a": 1.0}, 2.0), report("b", {}, None)]
    assert table_lines(reports) == [
        "adapter  steps  validation loss  best  training loss",
        "first        5           1.0000               2.0000",
        "b            5",
    ]
    write_table(tmp_path, reports)
    assert (tmp_path / "adapters.md").read_text() == (
        "| adapter | steps | validation loss | best | training loss |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| first | 5 | 1.0000 |  | 2.0000 |\n"
        "| b | 5 |  |  |  |\n"
    )
    assert json.loads((tmp_path / "adapters.json").read_text())[1]["validation_loss"] is None
