"""A user's own task: a file of rows and a text file."""

import pytest
from evaluation.conftest import evaluate_with, write_rows
from evaluation.reference_scores import choice_scores, label_logits

from moe_jax.errors import UserError
from moe_jax.evaluation.model_evaluation import evaluate
from moe_jax.tasks.selection import template_task

PLAIN = "Question: {question}\n{options}\nAnswer:\n"
ROWS = [
    {"question": "Who?", "choices": ["Ann", "Bob"], "answer": "Bob"},
    {"question": "Where?", "choices": ["in", "out", "up"], "answer": "C"},
    {"question": "How?", "choices": ["B", "A"], "answer": "A"},
    {"question": "When?", "choices": ["now", "then"], "answer": 0},
]


@pytest.fixture
def make(tmp_path):
    """The task that a template and rows make."""

    def make_task(template: str, rows: list, **fields):
        (tmp_path / "quiz.txt").write_text(template)
        data = write_rows(tmp_path / "quiz.jsonl", rows)
        return template_task(tmp_path / "quiz.txt", data, **fields)

    return make_task


def test_options_and_answers(make):
    task = make(PLAIN, ROWS)
    questions = task.questions()
    assert task.name == "quiz"
    assert [q.answer for q in questions] == [1, 2, 1, 0]
    assert questions[1].prompt == "Question: Where?\n(A) in\n(B) out\n(C) up\nAnswer:"
    assert questions[1].labels == ("A", "B", "C")
    # Without the line of the options.
    assert questions[1].choices[2] == ("Question: Where?\nAnswer:", " up")


def test_columns_of_any_name(make):
    template = (
        "{{Read}} {passage}\n\n{n}. {question}\nAnswer:\n"
        "--- choices ---\n{right}\nnot {right}\n{more}\n--- answer ---\n{right}\n"
    )
    row = {"passage": "Text.", "n": 3, "question": "So?", "right": "yes", "more": ["x", "y"]}
    (question,) = make(template, [row]).questions()
    assert question.prompt == "{Read} Text.\n\n3. So?\nAnswer:"
    assert [choice.continuation for choice in question.choices] == [" yes", " not yes", " x", " y"]
    assert question.answer == 0
    assert question.labels == ()


def test_fixed_choices_are_labels(make):
    template = "{question}\nTrue or false:\n--- choices ---\ntrue\nfalse\n"
    (question,) = make(template, [{"question": "Is it?", "answer": False}]).questions()
    assert question.labels == ("true", "false")
    assert question.answer == 1


def test_matches_the_reference_scores(make, setting):
    task = make(PLAIN, ROWS)
    labels, choices = evaluate(setting.base, [task]).outcomes
    for question, by_label, by_choice in zip(
        task.questions(), labels.examples, choices.examples, strict=True
    ):
        logits = label_logits(
            setting.reference, setting.tokenizer, question.prompt, question.labels
        )
        assert by_label["picked"]["label_acc"] == logits.argmax()
        scores = choice_scores(setting.reference, setting.tokenizer, question.choices)
        assert by_choice["picked"]["acc"] == scores.argmax()
    free = make("{question}\nAnswer:", ROWS)
    assert [o.protocol for o in evaluate(setting.base, [free]).outcomes] == ["choices"]
    with pytest.raises(UserError, match="'quiz': has no labels; use the protocol 'choices'"):
        evaluate_with(setting.base, [free], protocols=["labels"])


def test_shots_come_from_a_folder(make, tmp_path):
    write_rows(tmp_path / "folder" / "train.jsonl", ROWS[:1])
    write_rows(tmp_path / "folder" / "test.jsonl", ROWS[1:])
    (tmp_path / "quiz.txt").write_text(PLAIN)
    first, *_ = template_task(tmp_path / "quiz.txt", tmp_path / "folder", shots=1).questions()
    assert first.prompt.startswith(
        "Question: Who?\n(A) Ann\n(B) Bob\nAnswer: B\n\nQuestion: Where?"
    )
    with pytest.raises(UserError, match="shots is 2, but the split 'train' has 1;"):
        template_task(tmp_path / "quiz.txt", tmp_path / "folder", shots=2).questions()
    for field in ({"shots": 1}, {"split": "test"}):
        with pytest.raises(UserError, match=r"quiz.jsonl is a single file, which has no splits"):
            make(PLAIN, ROWS, **field).questions()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question\n", "quiz.txt: .* write a literal brace twice"),
        ("{question!r}", "quiz.txt: a placeholder is {column} and nothing else"),
        ("{}", "quiz.txt: a placeholder is {column} and nothing else"),
        ("Q {options}\nAnswer:", "quiz.txt: {options} must be a line by itself"),
        ("{options}\n{options}", "quiz.txt: {options} must be a line by itself, .* once"),
        ("\n", "quiz.txt: a section.* is empty"),
        ("q\n--- choices ---\na\n\nb\n", "quiz.txt: .* a line of the choices, is empty"),
        ("q\n--- choices ---\na\nb\na\n", "quiz.txt: the line 'a' of the choices is given twice"),
        ("q\n--- answers ---\na\n", "the section 'answers' is unknown; known: choices, answer"),
        ("q\n--- answer ---\na\n--- answer ---\na\n", "the section 'answer' is given twice"),
    ],
)
def test_bad_templates(make, template, message):
    with pytest.raises(UserError, match=message):
        make(template, ROWS).questions()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "line 1: the answer is 2, not an index from 0 to 1"),
        ({"answer": "1"}, r"line 1: the answer is str \('1'\); it must be the text .*Ann, Bob"),
        ({"answer": "C"}, r"line 1: the answer is str \('C'\)"),
        ({"answer": None}, "line 1: column 'answer' must be a text"),
        (
            {"choices": ["Bob", "Al", "Bob"]},
            r"jsonl: line 1: the choices 1 and 3 are equal \('Bob'\)",
        ),
        ({"choices": ["Bob"]}, "column 'choices' must hold at least 2"),
        ({"choices": "Bob"}, "line 1: 1 choices, but 2 to 26 are required"),
        ({"question": ["a"]}, "line 1: column 'question' must be a text"),
    ],
)
def test_bad_rows(make, change, message):
    with pytest.raises(UserError, match=message):
        make(PLAIN, [{**ROWS[0], **change}]).questions()


def test_missing_files(tmp_path):
    task = template_task(tmp_path / "nowhere.txt", write_rows(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(UserError, match=r"nowhere.txt: no such task template"):
        task.questions()
    (tmp_path / "quiz.txt").write_text(PLAIN)
    with pytest.raises(UserError, match=r"b.jsonl: no such file or folder"):
        template_task(tmp_path / "quiz.txt", tmp_path / "b.jsonl").questions()
