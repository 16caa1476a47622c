import collections
import json
import re

from moe_jax.demo.corpus import TASKS, instruction_rows, plain_sentences, write_corpus


def test_data_depend_on_the_seed_only():
    assert plain_sentences(seed=3, count=20) == plain_sentences(seed=3, count=20)
    assert plain_sentences(seed=3, count=20) != plain_sentences(seed=4, count=20)
    assert instruction_rows(seed=3) == instruction_rows(seed=3)
    assert instruction_rows(seed=3) != instruction_rows(seed=4)


def test_splits_do_not_share_a_question():
    train, validation = instruction_rows(seed=0)
    seen = {(row.task, row.input) for row in train}
    assert not any((row.task, row.input) in seen for row in validation)


def test_swapped_sums_are_in_the_same_split():
    train, validation = instruction_rows(seed=0)
    summands = lambda row: frozenset(row.input.split(" + "))
    seen = {summands(row) for row in train if row.task == "sum"}
    assert not any(summands(row) in seen for row in validation if row.task == "sum")


def test_answers_are_right():
    for rows in instruction_rows(seed=0):
        for row in rows:
            if row.task == "sum":
                a, b = row.input.split(" + ")
                assert int(row.output) == int(a) + int(b)
            elif row.task == "reverse":
                assert row.output == row.input[::-1]
            elif row.task == "sort":
                assert "".join(row.output.split()) == "".join(sorted(row.input.replace(" ", "")))


def test_questions_have_one_answer():
    for rows in instruction_rows(seed=0):
        answers = collections.defaultdict(set)
        for row in rows:
            answers[row.task, row.input].add(row.output)
        assert all(len(outputs) == 1 for outputs in answers.values())


def test_sentences_state_facts_and_never_instruct():
    text = "\n".join(plain_sentences(seed=0, count=20_000))
    assert "The opposite of hot is cold." in text
    assert "The plural of mouse is mice." in text
    train, validation = instruction_rows(seed=0)
    assert not any(instruction in text for instruction in {r.instruction for r in train})
    letters = {row.input for row in validation if row.task in ("reverse", "sort")}
    assert letters
    shown = set(re.findall(r"(?:Backwards|turns|In order|puts) ((?:[a-z] )*[a-z]) ", text))
    assert len(shown) > 1000
    assert not shown & letters


def test_written_rows_are_the_rows(tmp_path):
    write_corpus(tmp_path, seed=0)
    train, validation = instruction_rows(seed=0)
    read = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    assert len(read(tmp_path / "train.jsonl")) == len(train)
    files = {path.stem: read(path) for path in (tmp_path / "validation").iterdir()}
    assert set(files) == set(TASKS)
    assert sum(map(len, files.values())) == len(validation)
    assert all(row["task"] == task for task, rows in files.items() for row in rows)
