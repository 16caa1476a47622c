"""What a run puts on record of its data sets."""

import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.training.record import data_set


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
