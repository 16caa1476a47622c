"""Training on the questions of a task reads the ids that evaluation scores."""

import functools

import numpy as np
import pytest
from evaluation.conftest import write_rows
from evaluation.families import FAMILIES

from moe_jax.config.data import DataConfig, SourceConfig
from moe_jax.data.tokenized_source import tokenize_source
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.evaluation.scoring_protocols import SCORING_PROTOCOLS
from moe_jax.tasks.selection import named_task
from moe_jax.tasks.training_rows import question_rows, read_source_or_task

TEMPLATE = "Which is a {kind}?\n{options}\nAnswer:"
KIND_ROWS = [
    {"kind": "colour", "choices": ["dog", "red"], "answer": 1},
    {"kind": "fruit", "choices": ["plum", "sea"], "answer": "A"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("moe_jax/demo/base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task, family in FAMILIES.items():
        for name, rows in family.files.items():
            write_rows(folder / task / name, rows)
    for split in ("train", "test"):
        write_rows(folder / "kinds" / f"{split}.jsonl", KIND_ROWS)
    (folder / "kinds" / "template.txt").write_text(TEMPLATE)
    return folder


def _tokenized(source, folder, tokenizer):
    """Ids and loss mask of each row."""
    read = functools.partial(read_source_or_task, folder=folder)
    config = DataConfig(train={"questions": source}, max_length=512)
    tokenized = tokenize_source("questions", source, config, tokenizer, read)
    rows = tokenized.sequences(np.arange(len(tokenized.kept)))
    return [(row.tokens.tolist(), row.loss_mask.tolist()) for row in rows]


@pytest.mark.parametrize("answer", ["label", "choice"])
@pytest.mark.parametrize("task", [*FAMILIES, "kinds"])
def test_training_ids_equal_those_that_evaluation_scores(task, answer, folder, tokenizer):
    questions = named_task(task, data=folder, shots=0).questions()
    split = named_task(task).hub.split if task in FAMILIES else "test"
    source = SourceConfig(task=task, split=split, answer=answer)
    rows = _tokenized(source, folder, tokenizer)
    scored = SCORING_PROTOCOLS[f"{answer}s"].prepare(task, questions, tokenizer)
    assert len(rows) == len(scored) == len(questions)
    for (tokens, mask), (question, items) in zip(rows, scored, strict=True):
        item = items[question.answer]
        assert tokens == [*item.tokens, item.targets[-1], tokenizer.eos_token_id]
        label, choice = f" {question.labels[question.answer]}", question.choices[question.answer]
        completion = label if answer == "label" else choice.continuation
        learnt = [token for token, is_target in zip(tokens, mask, strict=True) if is_target]
        assert tokenizer.decode(learnt[:-1]).strip() == completion.strip()
        assert mask[-len(learnt) :] == [True] * len(learnt)


# The expected prompts of mmlu have shots; training has none.
@pytest.mark.parametrize("task", sorted(set(FAMILIES) - {"mmlu"}))
def test_training_prompts_by_hand(task, folder):
    made = named_task(task, data=folder, shots=0)
    labels, choices = question_rows(made, "label"), question_rows(made, "choice")
    for row, choice_row, expected in zip(labels, choices, FAMILIES[task].expected, strict=True):
        prompt, known, options, right = expected
        assert (row["prompt"], row["completion"]) == (prompt, f" {known[right]}")
        assert (choice_row["prompt"], choice_row["completion"]) == options[right]


def test_a_part_of_a_split_and_a_single_file(folder, tokenizer):
    whole = _tokenized(SourceConfig(task="kinds"), folder, tokenizer)
    half = _tokenized(SourceConfig(task="kinds", split="train[:50%]"), folder, tokenizer)
    assert half == whole[:1] != whole
    one = SourceConfig(task="kinds", path=str(folder / "kinds" / "test.jsonl"))
    assert _tokenized(one, folder, tokenizer) == whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"task": "arc_esy"},
            "task 'arc_esy': unknown task; did you mean 'arc_easy'",
        ),
        ({"task": "kins"}, "did you mean 'kinds'"),
        ({"task": "kinds", "split": "dev"}, "kinds: no file is named after the split 'dev'"),
        ({"task": "kinds", "split": "train[:x]"}, r"task 'kinds': cannot take the split"),
        ({"task": "boolq"}, r"boolq.train.jsonl: line 1: .*'answer' must be true or false"),
        (
            {"task": "unlabeled"},
            "task 'unlabeled': has no labels to learn; set answer to 'choice'",
        ),
        ({"task": "kinds", "path": "/nowhere"}, "/nowhere: no such file or folder"),
    ],
)
def test_bad_sources(fields, message, folder, tokenizer):
    write_rows(folder / "unlabeled" / "train.jsonl", KIND_ROWS)
    (folder / "unlabeled" / "template.txt").write_text("Which is a {kind}?\nAnswer:")
    with pytest.raises(UserError, match=message):
        _tokenized(SourceConfig(**fields), folder, tokenizer)


def test_a_folder_may_not_take_the_name_of_a_task(folder, tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "template.txt").write_text(TEMPLATE)
    with pytest.raises(
        UserError, match=r"boolq.template.txt: the name 'boolq' of this task is taken"
    ):
        named_task("boolq", data=tmp_path)
