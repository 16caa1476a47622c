"""Rows of GLUE as texts with labels, and as questions."""

import functools
import json

import numpy as np
import pytest

from moe_jax.config.classification import GLUE, ClassificationConfig
from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.data.tokenized_source import tokenize_source
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import ConfigError, DataError
from moe_jax.tasks.families.glue import ClassificationTask, LabeledText
from moe_jax.tasks.selection import named_task, task_names
from moe_jax.tasks.task import TASKS, Choice
from moe_jax.tasks.task_rows import TaskRow
from moe_jax.tasks.training_rows import read_source_or_task

TASKS_OF_GLUE = [name for name, cls in TASKS.items() if issubclass(cls, ClassificationTask)]

# By task: a row of the hub, its text and label, and its prompt and answer by hand.
ROWS = {
    "cola": (
        {"sentence": "She slept the bed.", "label": 0, "idx": 0},
        ("She slept the bed.", "", "unacceptable"),
        (
            "Say whether the sentence is grammatical, no or yes.\n\n"
            "Sentence: She slept the bed.\nAnswer:"
        ),
        "no",
    ),
    "sst2": (
        {"sentence": "a warm , funny film ", "label": 1, "idx": 3},
        ("a warm , funny film", "", "positive"),
        (
            "Say whether the film review is negative or positive.\n\n"
            "Review: a warm , funny film\nAnswer:"
        ),
        "positive",
    ),
    "mrpc": (
        {"sentence1": "It rose.", "sentence2": "It went up.", "label": 1},
        ("It rose.", "It went up.", "equivalent"),
        (
            "Say whether both sentences mean the same, no or yes.\n\n"
            "First sentence: It rose.\nSecond sentence: It went up.\nAnswer:"
        ),
        "yes",
    ),
    "qqp": (
        {"question1": "Who?", "question2": "", "label": 0},  # a few have no second question
        ("Who?", "", "not_duplicate"),
        (
            "Say whether both questions ask the same, no or yes.\n\n"
            "First question: Who?\nSecond question: \nAnswer:"
        ),
        "no",
    ),
    "mnli": (
        {"premise": "It rains.", "hypothesis": "It is cold.", "label": 1},
        ("It rains.", "It is cold.", "neutral"),
        (
            "Say whether the hypothesis follows from the premise: yes, maybe or no.\n\n"
            "Premise: It rains.\nHypothesis: It is cold.\nAnswer:"
        ),
        "maybe",
    ),
    "mnli_mismatched": (
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": 2},
        ("It rains.", "It is dry.", "contradiction"),
        (
            "Say whether the hypothesis follows from the premise: yes, maybe or no.\n\n"
            "Premise: It rains.\nHypothesis: It is dry.\nAnswer:"
        ),
        "no",
    ),
    "qnli": (
        {"question": "Who won?", "sentence": "Ann won.", "label": 0},
        ("Who won?", "Ann won.", "entailment"),
        (
            "Say whether the sentence answers the question, yes or no.\n\n"
            "Question: Who won?\nSentence: Ann won.\nAnswer:"
        ),
        "yes",
    ),
    "rte": (
        {"sentence1": "Ann won.", "sentence2": "Ann lost.", "label": 1},
        ("Ann won.", "Ann lost.", "not_entailment"),
        (
            "Say whether the hypothesis follows from the premise, yes or no.\n\n"
            "Premise: Ann won.\nHypothesis: Ann lost.\nAnswer:"
        ),
        "no",
    ),
    "stsb": (
        {"sentence1": "A dog.", "sentence2": "A cat.", "label": 1.75},
        ("A dog.", "A cat.", 1.75),
        None,
        None,
    ),
}


def test_all_tasks_are_covered():
    assert set(TASKS_OF_GLUE) == set(ROWS) <= set(task_names())
    assert {TASKS[name].glue for name in ROWS} == set(GLUE)


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    fields, (text, pair, label), prompt, word = ROWS[name]
    task, row = named_task(name), TaskRow("here: row 1", fields)
    assert task.labeled(row) == LabeledText("here: row 1", text, pair, label)
    if prompt is None:
        with pytest.raises(DataError, match="asks for a number, which only an adapter with"):
            task.question(row)
        return
    question = task.question(row)
    assert question.whole_prompt == prompt
    assert question.labels[question.answer] == word
    assert question.choices == tuple(Choice(question.prompt, text) for text in question.label_texts)


def test_the_hub():
    found = {name: TASKS[name].hub for name in TASKS_OF_GLUE}
    assert {hub.dataset for hub in found.values()} == {"nyu-mll/glue"}
    assert found["mnli"][1:] == ("mnli", "validation_matched", "train")
    assert found["mnli_mismatched"][1:] == ("mnli", "validation_mismatched", "train")
    assert found["rte"][1:] == ("rte", "validation", "train")


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("sst2", {"sentence": "x", "label": -1}, "use a split whose answers are public"),
        ("sst2", {"sentence": "x", "label": "good"}, "not one of the labels (negative, positive)"),
        ("sst2", {"text": "x", "label": 1}, "no column 'sentence' (it has: text, label)"),
        ("sst2", {"sentence": 3, "label": 1}, "column 'sentence' must be text, got int (3)"),
        ("stsb", {"sentence1": "x", "sentence2": "y", "label": "c"}, "must be a finite number"),
    ],
)
def test_rows_that_do_not_fit_are_named(name, fields, words):
    with pytest.raises(DataError) as error:
        named_task(name).labeled(TaskRow("rows.jsonl: line 7", fields))
    assert str(error.value).startswith("rows.jsonl: line 7: ")
    assert words in str(error.value)


def test_classifiers_read_texts_and_language_models_questions(tmp_path):
    rows = [ROWS["rte"][0], {"sentence1": "Up.", "sentence2": "Not down.", "label": 0}]
    (tmp_path / "rte").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rte" / "train.jsonl").write_text(text)
    source = SourceConfig(task="rte")
    table = read_source_or_task(source, None, folder=str(tmp_path), classified=True)
    where = f"{tmp_path}/rte/train.jsonl: line"
    assert table.rows.to_list() == [
        {
            "text": "Ann won.",
            "text_pair": "Ann lost.",
            "label": '"not_entailment"',
            "where": f"{where} 1",
        },
        {
            "text": "Up.",
            "text_pair": "Not down.",
            "label": '"entailment"',
            "where": f"{where} 2",
        },
    ]
    read = functools.partial(read_source_or_task, folder=str(tmp_path), classified=True)
    config = DataConfig(train={"rte": source}, max_length=64)
    tokenizer = load_tokenizer("moe_jax/demo/base")
    made = tokenize_source("rte", source, config, tokenizer, read, ClassificationConfig(glue="rte"))
    for row, label in zip(made.sequences(np.arange(2)), (1.0, 0.0), strict=True):
        assert np.flatnonzero(row.loss_mask).tolist() == [len(row.tokens) - 1]
        assert row.label == label
    asked = read_source_or_task(source, None, folder=str(tmp_path))
    assert asked.rows[1]["completion"] == " yes"
    with pytest.raises(DataError, match="'boolq': is not a classification task; known: cola"):
        read_source_or_task(SourceConfig(task="boolq"), None, folder=None, classified=True)
    with pytest.raises(ConfigError, match="did you mean 'sst2'"):
        named_task("sst22")
