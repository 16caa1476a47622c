"""`moe-jax evaluate`: output, files and errors."""

import json
import re

import pytest
from evaluation.conftest import write_rows
from evaluation.families import ARC_ROWS

from moe_jax.cli import main
from moe_jax.evaluation.scorer import Scorer
from moe_jax.tasks.selection import task_names


def test_all_flags(setting, tmp_path, capsys):
    (tmp_path / "quiz.txt").write_text("{question}\n{options}\nAnswer:\n")
    row = {"question": "Who?", "choices": ["Ann", "Bob"], "answer": "Bob"}
    data = write_rows(tmp_path / "quiz.jsonl", [row])
    command = ["evaluate", "--base", str(setting.base), "--data", str(setting.data)]
    command += ["--tasks", "arc_challenge,boolq", "--own-task", str(tmp_path / "quiz.txt"), data]
    command += ["--adapter", str(setting.adapter), "--adapter", f"again={setting.adapter}"]
    command += ["--with-base", "--limit", "1", "--row-length", "96", "--batch-size", "4"]
    command += ["--output", str(tmp_path / "out")]

    assert main(command) == 0
    captured = capsys.readouterr()
    assert "base: arc_challenge, labels: 1 questions\n" in captured.err
    printed = captured.out.strip()
    assert printed == (tmp_path / "out" / "results.md").read_text().strip()
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [model["name"] for model in saved["models"]] == ["base", "tuned", "again"]
    assert [task["name"] for task in saved["tasks"]] == ["arc_challenge", "boolq", "quiz"]
    assert [task["questions"] for task in saved["tasks"]] == [1, 1, 1]
    results = {(r["model"], r["task"], r["protocol"]): r["measures"] for r in saved["results"]}
    assert len(results) == 3 * 3 * 2
    # The same adapter under two names.
    for task in ("arc_challenge", "boolq", "quiz"):
        assert results["tuned", task, "choices"] == results["again", task, "choices"]

    # The base that the adapters remember is the same one.
    assert main([word for word in command if word not in ("--base", str(setting.base))]) == 0
    assert ", labels: 1 questions, 1 answered before\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --tasks: is missing"),
        (["--tasks", "arc"], "error: task 'arc': unknown task; "),
        (["--tasks", "boolq", "--protocols", "x"], "error: --protocols: there is none called 'x'"),
        (["--tasks", "boolq", "--batch-size", "0"], "error: --batch-size: must be positive, got 0"),
        (["--tasks", "boolq", "--limit", "0"], "error: --limit: must be positive, got 0"),
        (["--tasks", "boolq", "--shots", "-1"], "error: --shots: must not be negative, got -1"),
        (["--tasks", "boolq", "--row-length", "0"], "error: --row-length: must be positive, got 0"),
        (["--tasks", "boolq", "--mesh", "dat=2"], "error: --mesh.dat: unknown field; did you "),
        (["--tasks", "boolq", "--mesh", "data"], "error: --mesh data: expected whole numbers"),
        (["--tasks", "boolq", "--mesh", "data=99"], "error: .* data=99 .* needs 99 devices"),
        (["--tasks", "boolq", "--adapter", "a/x", "--adapter", "b/x"], "another .* is named 'x'"),
    ],
)
def test_errors_are_one_line(setting, capsys, arguments, message):
    common = ["evaluate", "--base", str(setting.base), "--data", str(setting.data)]
    assert main([*common, *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("output", "kept"),
    [([], "no results are kept"), (["--output", "out"], "the same command resumes")],
)
def test_interrupt_prints_how_to_resume(setting, monkeypatch, tmp_path, capsys, output, kept):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Scorer, "scores", interrupted)
    common = ["evaluate", "--base", str(setting.base), "--data", str(setting.data)]
    with pytest.raises(SystemExit, match="130"):
        main([*common, "--tasks", "boolq", *output])
    assert f"stopped; {kept}\n" in capsys.readouterr().err


def test_invalid_row_is_named(setting, tmp_path, capsys):
    write_rows(tmp_path / "arc_easy" / "test.jsonl", [*ARC_ROWS, {"question": "?"}])
    command = ["evaluate", "--base", str(setting.base), "--data", str(tmp_path)]
    assert main([*command, "--tasks", "arc_easy"]) == 2
    assert "test.jsonl: line 4: no column 'choices'" in capsys.readouterr().err


def test_help_lists_the_tasks(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", "--help"])
    shown = capsys.readouterr().out
    assert ", ".join(task_names()) in shown
    assert "{question}\n" in shown
