"""Refusals of benchmarks before they measure, and their messages."""

from pathlib import Path

import pytest

from benchmarks.report import check_output, refuse
from moe_jax.errors import ConfigError


def test_checking_the_output_writes_nothing(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("figures")
    for file in (new, old, None):
        check_output(file)
    assert not new.exists()
    assert old.read_text() == "figures"


def test_an_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse_to_open(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse_to_open)
    file = tmp_path / "x.json"
    with pytest.raises(ConfigError, match=f"^--output {file}: permission denied; name another"):
        check_output(file)


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("config.compute.remat: 'foo' is none", "--remat: 'foo' is none"),
        ("config.mesh.foo: unknown field", "--mesh foo: unknown field"),
        ("config.adapters.a.data.max_length: too short: 1", "--length: too short: 1"),
        ("config.training.steps: no flag's", "config.training.steps: no flag's"),
        ("--rows: must be positive", "--rows: must be positive"),
    ],
)
def test_field_errors_name_the_flags(message, printed, capsys):
    assert refuse(ConfigError(message)) == 2
    assert capsys.readouterr().err == f"error: {printed}\n"
