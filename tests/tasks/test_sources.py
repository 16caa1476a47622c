"""Invalid rows, missing data, and a task registered from outside of the package."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from evaluation.conftest import write_rows
from evaluation.families import ARC_ROWS, FAMILIES

from moe_jax.config.parse import parse
from moe_jax.errors import ConfigError, DataError
from moe_jax.tasks.selection import make_task, named_task, task_names
from moe_jax.tasks.task import TASKS, Question, Task, lettered_question
from moe_jax.tasks.task_rows import HubData, TaskRow, read_hub, read_local


def questions(tmp_path, name, rows):
    task = TASKS[name]
    file = write_rows(tmp_path / f"{task.hub.split}.jsonl", rows)
    return make_task(task, name, path=file, shots=0).questions()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("arc_easy", {"answerKey": "E"}, "'answerKey' is str .'E'., not one of A, B, C;"),
        ("arc_easy", {"question": None}, "column 'question' must be a text .* got null"),
        ("arc_easy", {"question": " "}, "column 'question' must be a text that is not blank"),
        ("arc_easy", {"question": "\ud800"}, "'question' holds an unpaired surrogate"),
        ("arc_easy", {"choices": ["a"]}, "column 'choices' must be an object, got list"),
        ("arc_easy", {"choices": {"text": ["a"]}}, "choices: column 'text' must hold at least 2"),
        (
            "arc_easy",
            {"choices": {"text": ["a", "b"], "label": ["A"]}},
            "choices: column 'label' must hold 2 texts, got 1",
        ),
        (
            "arc_easy",
            {"choices": {"text": ["a", "b"], "label": ["A", "A"]}},
            "choices: column 'label' holds a label twice",
        ),
        ("boolq", {"answer": "yes"}, "column 'answer' must be true or false, got str"),
        ("piqa", {"label": -1}, "column 'label' is int .-1., .* split whose answers are public"),
        ("piqa", {"label": True}, "column 'label' is bool .True., not one of 0, 1;"),
        ("hellaswag", {"label": ""}, "column 'label' is str"),
        ("hellaswag", {"endings": ["a", "b"]}, "column 'endings' must hold 4 texts, got 2"),
        ("winogrande", {"sentence": "No blank."}, "'sentence' must have a blank"),
        ("winogrande", {"sentence": "At the end _"}, "'sentence' must have a blank .* after it"),
        ("mmlu", {"choices": "abcd"}, "column 'choices' must be a list, got str"),
        ("pubmedqa", {"final_decision": "perhaps"}, "'final_decision' .* yes, no, maybe"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, name, change, message):
    rows = next(iter(FAMILIES[name].files.values()))
    with pytest.raises(DataError, match=rf"jsonl: line 2: .*{message}"):
        questions(tmp_path, name, [rows[0], {**rows[0], **change}])


def test_columns_that_are_missing(tmp_path):
    with pytest.raises(DataError, match=r"line 1: no column 'goal' \(it has: label\)"):
        questions(tmp_path, "piqa", [{"label": 0}])
    with pytest.raises(DataError, match=r"line 1: a row must be an object .* got int"):
        questions(tmp_path, "piqa", [5])


def test_missing_data(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such folder; give one with"):
        named_task("boolq", data=tmp_path / "nowhere").questions()
    (tmp_path / "boolq").mkdir()
    with pytest.raises(DataError, match=r"boolq: the folder holds no \.json, "):
        named_task("boolq", data=tmp_path).questions()
    (tmp_path / "boolq" / "validation.jsonl").write_text("\n")
    with pytest.raises(DataError, match="boolq: the split 'validation' holds no rows"):
        named_task("boolq", data=tmp_path).questions()
    (tmp_path / "boolq" / "validation.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"validation.jsonl: line 1: not valid JSON"):
        named_task("boolq", data=tmp_path).questions()
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(DataError, match=r"rows.txt: unknown kind of file"):
        read_local(tmp_path / "rows.txt", None, "test", None)


def test_hidden_files_are_no_rows_and_tables_are(tmp_path):
    for name in (".ipynb_checkpoints", "__MACOSX"):
        write_rows(tmp_path / name / "test.jsonl", [{"a": "hidden"}])
    (tmp_path / "test.csv").write_text("a\nseen\n")
    assert [row.fields for row in read_local(tmp_path, None, "test", None)] == [{"a": "seen"}]


def test_split_names_match_exactly(tmp_path):
    for name in ("dev", "validation", "test-00000-of-00002", "test-00001-of-00002"):
        write_rows(tmp_path / f"{name}.jsonl", [{"name": name}])
    found = {
        split: [row.fields["name"] for row in read_local(tmp_path, None, split, None)]
        for split in ("dev", "validation", "test")
    }
    assert found == {
        "dev": ["dev"],
        "validation": ["validation"],
        "test": ["test-00000-of-00002", "test-00001-of-00002"],
    }
    assert len(read_local(tmp_path, None, "test", 1)) == 1


def test_rows_of_the_datasets_library(tmp_path):
    """The call for a hub id, on a folder, which the library accepts too."""
    write_rows(tmp_path / "ARC" / "test.parquet", ARC_ROWS)
    hub = HubData(str(tmp_path / "ARC"), None, "test", "train")
    rows = read_hub(hub, "test", 2)
    assert [row.where for row in rows] == [
        f"{hub.dataset}, test: row 1",
        f"{hub.dataset}, test: row 2",
    ]
    found = [TASKS["arc_easy"]().question(row).prompt for row in rows]
    local = [q.prompt for q in questions(tmp_path, "arc_easy", ARC_ROWS[:2])]
    assert found == local
    with pytest.raises(DataError, match="the split 'dev' of this hub data set cannot be read"):
        read_hub(hub, "dev", None)


def test_a_configuration_picks_a_task_by_name(tmp_path):
    given = {"name": "arc_easy", "path": str(tmp_path), "limit": 3}
    task = parse(Task, given, "config.task")
    assert type(task) is TASKS["arc_easy"]
    assert (task.name, task.limit) == ("arc_easy", 3)
    with pytest.raises(ConfigError, match=r"config\.task\.limit: must be positive"):
        parse(Task, {**given, "limit": 0}, "config.task")


def test_a_task_from_outside_the_package(tmp_path):
    @TASKS.register("parity")
    @dataclass(frozen=True, kw_only=True)
    class Parity(Task):
        hub: ClassVar[HubData] = HubData("nobody/parity", None, "test", "train")

        def question(self, row: TaskRow) -> Question:
            stem, answer = f"Is {row.text('number')} even?", int(row.text("number")) % 2
            return lettered_question(row, preface="", stem=stem, texts=("yes", "no"), answer=answer)

    try:
        assert "parity" in task_names()
        write_rows(tmp_path / "parity" / "test.jsonl", [{"number": "3"}])
        (found,) = named_task("parity", data=tmp_path).questions()
        assert found.prompt == "Is 3 even?\n(A) yes\n(B) no\nAnswer:"
        assert found.answer == 1
    finally:
        del TASKS._members["parity"]
