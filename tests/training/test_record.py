"""What a run puts on record of its data sets and of its metrics."""

import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.training.records.record import data_set, last_accuracies, last_metrics

LINES = [  # the latest first
    {"step": 9, "x/loss": None, "validation/xy/a/loss": 7.0, "validation/xy/a/f1": 0.7},
    {"step": 8, "evaluation/xy/boolq/acc": 0.9},
    {"step": 8, "validation/x/a/loss": 2.0, "validation/x/b/loss": 1.0, "validation/x/b/f1": None},
    {"step": 6, "evaluation/x/boolq/acc": 0.5, "evaluation/x/boolq/label_acc": 0.25},
    {"step": 6, "evaluation/x/arc_easy/acc": 0.125},
    {"step": 4, "x/loss": 3.0, "validation/x/b/loss": 4.0, "validation/x/b/f1": 0.4},
]


@pytest.mark.parametrize(
    ("fields", "folder", "path", "on_hub"),
    [
        ({"task": "arc_easy"}, None, "allenai/ai2_arc", True),
        ({"task": "arc_easy"}, "{here}", "{here}/arc_easy", False),
        ({"task": "arc_easy", "path": "{here}/rows.jsonl"}, None, "{here}/rows.jsonl", False),
        ({"path": "owner/rows", "schema": "text"}, None, "owner/rows", True),
        ({"path": "{here}/rows.jsonl", "schema": "text"}, None, "{here}/rows.jsonl", False),
    ],
)
def test_where_rows_came_from(tmp_path, fields, folder, path, on_hub):
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "rows.jsonl").touch()
    fields = {k: v.format(here=tmp_path) for k, v in fields.items()}
    folder = None if folder is None else str(tmp_path)
    found = data_set(SourceConfig(**fields), 7, folder)
    assert (found.path, found.on_hub, found.rows) == (path.format(here=tmp_path), on_hub, 7)


def test_what_was_measured_last():
    assert last_metrics(LINES, "validation/x/b") == {"f1": None}
    assert last_metrics(LINES[3:], "validation/x/b") == {"f1": 0.4}
    assert last_metrics(LINES, "validation/x/a") == {}
    assert last_accuracies(LINES, "x") == (6, {"boolq": {"acc": 0.5, "label_acc": 0.25}})
    assert last_accuracies(LINES, "y") == (None, {})
