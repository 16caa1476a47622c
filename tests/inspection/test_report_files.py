"""Files of a report: tables, JSON and figures agree."""

import csv
import json
import math

import numpy as np
import pytest
from inspection.conftest import BASE
from tolerances import OF_SIX_DIGITS, SIX_DIGITS

import moe_jax
from moe_jax.cli import main
from moe_jax.inspection import routing_plots
from moe_jax.inspection.report_files import save_routing_report


@pytest.fixture(scope="module")
def folder(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "seen"
    written = save_routing_report(setting.report, folder)
    assert sorted(path.name for path in folder.iterdir()) == [path.name for path in written]
    return folder


def _table(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_written_files(folder):
    assert [path.name for path in sorted(folder.iterdir())] == [
        *("coactivation.csv", "coactivation.png", "coactivation_by_layer.png", "entropy.csv"),
        *("entropy.png", "load.csv", "load.png", "load_by_data.csv", "load_by_data.png"),
        *("routing.json", "tokens.html"),
    ]
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables_json_and_pictures_agree(setting, folder):
    report = setting.report
    stated = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
    load = routing_plots.load_map(report).axes[0].images[0].get_array()
    np.testing.assert_allclose(stated["load"], load, rtol=0, atol=SIX_DIGITS)
    rows = _table(folder / "load.csv")
    assert len(rows) == 16
    for row in rows:
        layer, expert = int(row["layer"]), int(row["expert"])
        assert float(row["load"]) == stated["load"][layer][expert]
        assert row["name"] == f"moe.mixlora.experts.{expert}"
    assert sum(float(row["share"]) for row in rows if row["layer"] == "2") == pytest.approx(
        1, abs=OF_SIX_DIGITS
    )

    drawn = routing_plots.coactivation_map(report).axes[0].images[0].get_array()
    panels = routing_plots.coactivation_by_layer(report).axes
    rows = _table(folder / "coactivation.csv")
    assert len(rows) == 5 * 6  # the mean and four layers, of six pairs
    for row in rows:
        a, b = int(row["expert_a"]), int(row["expert_b"])
        if row["layer"] == "mean":
            expected, shown = stated["mean_coactivation"][a][b], drawn
        else:
            expected = stated["coactivation"][int(row["layer"])][a][b]
            shown = panels[int(row["layer"])].images[0].get_array()
        assert float(row["coactivation"]) == expected
        assert shown[a, b] == shown[b, a] == pytest.approx(expected, abs=SIX_DIGITS)
    assert stated["coactivation"][0][0][0] is None

    lines = {
        line.get_label(): line.get_ydata()
        for line in routing_plots.entropy_by_layer(report).axes[0].lines
    }
    for row in _table(folder / "entropy.csv"):
        entropy = (stated if row["data"] == "all" else stated["data"][row["data"]])["entropy"]
        layer = int(row["layer"])
        assert float(row["mean"]) == entropy["mean"][layer]
        drawn = lines["all tokens" if row["data"] == "all" else row["data"]]
        assert drawn[layer] == pytest.approx(entropy["mean"][layer], abs=SIX_DIGITS)
        assert float(row["mean_nats"]) == pytest.approx(
            math.log(4) * float(row["mean"]), abs=OF_SIX_DIGITS
        )

    figure = routing_plots.load_by_data(report)
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(bars, stated["specialisation_bits"], rtol=0, atol=SIX_DIGITS)
    for row in _table(folder / "load_by_data.csv"):
        layer, expert = int(row["layer"]), int(row["expert"])
        own = stated["data"][row["data"]]["load"][layer][expert]
        assert float(row["load"]) == own
        shown = figure.axes[1 + layer].images[0].get_array()
        assert shown[list(stated["data"]).index(row["data"]), expert] == pytest.approx(
            own, abs=SIX_DIGITS
        )
    assert stated["summary"] == report.summary()


def test_figures_have_labels_and_mark_balance(setting):
    figures = [
        draw(setting.report)
        for draw in (
            routing_plots.load_map,
            routing_plots.coactivation_map,
            routing_plots.coactivation_by_layer,
        )
    ]
    for figure in [*figures, routing_plots.load_by_data(setting.report)]:
        bar = figure.axes[-1]
        assert "1 balanced" in [tick.get_text() for tick in bar.get_yticklabels()]
        assert bar.get_ylabel()
    axes = routing_plots.entropy_by_layer(setting.report).axes[0]
    assert axes.get_xlabel() == "layer" and "uniform" in axes.get_ylabel()


def test_the_command(setting, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("a red dog .\n\nthe bird sings .\n")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "rows.csv").write_text("instruction,output\na cat,a dog\n")
    (tmp_path / "q" / "rows.doc").touch()
    arguments = ["inspect", "--adapter", setting.folder, "--base", BASE, "--limit", 3]
    arguments += [
        "--data",
        f"notes={tmp_path / 'notes.txt'}",
        "--data",
        f"rows={tmp_path / 'q'}",
        "--text",
        "a cat",
        "--page-tokens",
        0,
    ]
    output = tmp_path / "seen"
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    notes, rows, text = printed.err.splitlines()
    assert notes.startswith("notes: 2 rows, ") and notes.endswith("schema 'text' by their columns")
    end = "schema 'instruction' by their columns, skipped 1 (unknown kind: rows.doc)"
    assert rows.startswith("rows: 1 rows, ") and rows.endswith(end)
    assert text.startswith("text: 1 rows, ") and "schema" not in text
    assert printed.out.startswith("router    mlp/moe of mixlora, 4 layers, 4 experts\n")
    assert all(word in printed.out for word in ("dead ", "entropy ", "most specialized: layer"))
    assert not (output / "tokens.html").exists()
    assert json.loads((output / "routing.json").read_text())["data"]["notes"]["rows"] == 2

    # The same again would overwrite it, which is refused before anything is computed.
    assert main([*map(str, arguments), "--output", str(output)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "a"], "--output: is missing"),
        (["--output", "{}"], "--data: there is no text"),
        (["--output", "{}", "--data", "a=x.txt", "--data", "a=y.txt"], "another one is named 'a'"),
        (["--output", "{}", "--data", "{}/none.txt"], "no such file"),
        (["--output", "{}", "--data", "{}/empty.txt"], "holds no rows"),
        (["--output", "{}", "--text", ""], "error: --text: is empty"),
        (["--output", "{}", "--text", "a", "--limit", "0"], "error: --limit: must be positive"),
        (["--output", "{}", "--text", "a", "--site", "mlp/foo"], "error: --site: adapter "),
        (["--output", "{}", "--data", "{}/rows.jsonl"], "'instruction' and 'text'; set `schema`"),
        (
            ["--output", "{}", "--text", "a", "--method", "lora"],
            "--method: cannot be combined with --adapter",
        ),
        (
            ["--output", "{}", "--text", "a", "--rank", "0"],
            "--rank: cannot be combined with --adapter",
        ),
    ],
)
def test_errors_are_one_line_and_leave_nothing(setting, tmp_path, capsys, arguments, words):
    data = tmp_path / "data"
    data.mkdir()
    (data / "empty.txt").touch()
    (data / "rows.jsonl").write_text('{"instruction": "a", "output": "b", "text": "c"}\n')
    for index, text in enumerate(arguments):
        target = tmp_path / "seen" if text == "{}" else data
        arguments = [*arguments[:index], text.replace("{}", str(target)), *arguments[index + 1 :]]
    fixed = ["inspect", "--adapter", str(setting.folder), "--base", str(BASE)]
    assert main([*fixed, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "seen").exists()


def test_a_full_disk_leaves_nothing(setting, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(routing_plots, "entropy_by_layer", fail)
    with pytest.raises(moe_jax.UserError, match="no space left"):
        save_routing_report(setting.report, tmp_path / "seen")
    assert list(tmp_path.iterdir()) == []
