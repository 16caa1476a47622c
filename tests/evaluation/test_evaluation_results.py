"""Accuracies, standard errors and tables, by hand."""

import json

import pytest

from moe_jax.evaluation.evaluation_results import Evaluation
from moe_jax.evaluation.outcomes import Accuracy, count_correct


def examples(right: int, wrong: int, measure: str, subject: str = "") -> list[dict]:
    return [
        {"answer": 1, "picked": {measure: int(index < right)}, "subject": subject}
        for index in range(right + wrong)
    ]


@pytest.fixture
def evaluation():
    """Two models on two tasks, one of them without labels."""
    outcomes = []
    for model, easy, hard in (("base", 8, 1), ("mine", 9, 2)):
        # Of 16 and of 4 questions.
        for task, right, count in (("easy", easy, 16), ("hard", hard, 4)):
            task_examples = examples(right, count - right, "acc")
            outcomes.append(count_correct(model, task, "choices", ("acc",), task_examples))
        labeled = examples(4, 12, "label_acc")
        outcomes.append(count_correct(model, "easy", "labels", ("label_acc",), labeled))
    return Evaluation({"base": {"path": "x"}}, outcomes)


def test_accuracy_and_its_error():
    accuracy = Accuracy(correct=8, questions=16)
    assert accuracy.value == 0.5
    assert accuracy.standard_error == 0.125  # sqrt(0.5 * 0.5 / 16)


def test_answers_that_are_all_right_or_all_wrong_do_not_tell_an_error():
    """Two right answers of two are more likely than not where 71% of all would be right."""
    assert Accuracy(2, 2).standard_error is Accuracy(0, 2).standard_error is None
    outcomes = [
        count_correct(model, task, "choices", ("acc",), examples(right, 2 - right, "acc"))
        for model, right in (("base", 0), ("mine", 2))
        for task in ("one", "two")
    ] + [
        count_correct(model, "three", "choices", ("acc",), examples(1, 1, "acc"))
        for model in ("base", "mine")
    ]
    result = Evaluation({}, outcomes)
    assert "| base | 0.0 ± - | 0.0 ± - | 50.0 ± 35.4 | 16.7 ± - |\n" in result.to_markdown()
    assert "| mine | 100.0 ± - | 100.0 ± - | 50.0 ± 35.4 | 83.3 ± - |\n" in result.to_markdown()
    assert "| mine - base | +100.0 ± - | +100.0 ± - | +0.0 ± - |  |\n" in result.to_markdown()
    plain = json.loads(json.dumps(result.to_plain()))
    assert plain["results"][0]["measures"]["acc"]["standard_error"] is None
    assert plain["averages"][0]["standard_error"] is None


def test_average_is_unweighted_over_tasks(evaluation):
    # 8 / 16 and 1 / 4, with errors 0.125 and sqrt(0.25 * 0.75 / 4) = 0.21651.
    value, error = evaluation.average("base", "acc")
    assert value == 0.375
    assert error == pytest.approx((0.125**2 + 0.21651**2) ** 0.5 / 2, abs=1e-5)
    assert evaluation.average("base", "label_acc") is None


def test_results_table(evaluation):
    # 9 / 16 = 0.5625, error sqrt(0.5625 * 0.4375 / 16) = 0.1240; 2 / 4, error 0.25;
    # their mean 0.53125, error sqrt(0.1240^2 + 0.25^2) / 2 = 0.1395.
    # base: mean 0.375, error sqrt(0.125^2 + 0.2165^2) / 2 = 0.125. 4 / 16: error 0.1083.
    assert evaluation.to_markdown() == (
        "In percent, ± one standard error. Differences are between answers to the same questions.\n"
        "\n"
        "**label_acc**: accuracy of the most likely label after a prompt that lists the options.\n"
        "\n"
        "| model | easy | hard | average |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| questions | 16 | 4 |  |\n"
        "| base | 25.0 ± 10.8 | - | - |\n"
        "| mine | 25.0 ± 10.8 | - | - |\n"
        "| mine - base | +0.0 ± - | - |  |\n"
        "\n"
        "**acc**: accuracy of the most likely option after the question.\n"
        "\n"
        "| model | easy | hard | average |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| questions | 16 | 4 |  |\n"
        "| base | 50.0 ± 12.5 | 25.0 ± 21.7 | 37.5 ± 12.5 |\n"
        "| mine | 56.2 ± 12.4 | 50.0 ± 25.0 | 53.1 ± 14.0 |\n"
        "| mine - base | +6.2 ± 6.2 | +25.0 ± 25.0 |  |\n"
    )


def test_differences_are_paired(evaluation):
    # One more right answer of 16: mean 1/16, variance (15/16)^2 + 15 / 16^2 over 15 = 1/16.
    assert evaluation.difference("mine", "easy", "acc") == pytest.approx((1 / 16, 1 / 16))
    assert evaluation.difference("mine", "hard", "acc") == pytest.approx((1 / 4, 1 / 4))
    assert evaluation.difference("mine", "hard", "label_acc") is None
    saved = evaluation.to_plain()["differences"]
    assert [(d["model"], d["to"], d["task"], d["measure"]) for d in saved] == [
        ("mine", "base", "easy", "label_acc"),
        ("mine", "base", "easy", "acc"),
        ("mine", "base", "hard", "acc"),
    ]


def test_saved_files(evaluation, tmp_path):
    evaluation.save(tmp_path)
    assert (tmp_path / "results.md").read_text() == evaluation.to_markdown()
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["base"] == {"path": "x"}
    assert saved["results"][0] == {
        "model": "base",
        "task": "easy",
        "protocol": "choices",
        "measures": {
            "acc": {"correct": 8, "questions": 16, "accuracy": 0.5, "standard_error": 0.125}
        },
    }
    assert [(a["model"], a["measure"]) for a in saved["averages"]] == [
        ("base", "acc"),
        ("mine", "acc"),
    ]


def test_subjects_of_a_task():
    both = examples(1, 1, "acc", "maths") + examples(1, 0, "acc", "art")
    outcome = count_correct("base", "exam", "choices", ("acc",), both)
    assert outcome.accuracies["acc"] == Accuracy(2, 3)
    assert outcome.subjects == {"acc": {"art": Accuracy(1, 1), "maths": Accuracy(1, 2)}}
    (result,) = Evaluation({}, [outcome]).to_plain()["results"]
    assert result["measures"]["acc"]["subjects"]["maths"]["correct"] == 1


def test_a_note_on_a_model_with_one_answer_for_all_questions():
    def evaluation(picked, answers):
        examples = [
            {"answer": answer, "picked": {"label_acc": pick}, "subject": ""}
            for pick, answer in zip(picked, answers, strict=True)
        ]
        outcome = count_correct("mine", "quiz", "labels", ("label_acc",), examples)
        return Evaluation({}, [outcome])

    answers = [0, 1, 2, 3] * 6
    same = evaluation([1] * 23 + [0], answers)
    (note,) = same.one_answer_notes()
    picks = "mine picks option 2 in 23 of 24 questions of quiz (label_acc)"
    assert note == f"{picks}, where it is the right one in 6"
    assert same.to_markdown().endswith(f"Note: {note}.\n")
    assert evaluation(answers, answers).one_answer_notes() == []
    assert evaluation([1] * 24, [1] * 24).one_answer_notes() == []  # it is right
    assert evaluation([1] * 19, answers[:19]).one_answer_notes() == []  # too few to tell
