"""Every task, both protocols, with and without an adapter, against reference scores.

The texts of the reference are written out by hand in `families`.
"""

import numpy as np
import pytest
from evaluation.conftest import evaluate_with
from evaluation.families import FAMILIES
from evaluation.reference_scores import choice_scores, label_logits, label_scores, per_character
from tolerances import FLOAT32_LOGITS

from moe_jax.tasks.families import TASKS
from moe_jax.tasks.families.glue import ClassificationTask
from moe_jax.tasks.selection import make_task, task_names


@pytest.fixture(scope="module")
def evaluation(setting):
    tasks = [
        make_task(TASKS[name], name, path=str(setting.data / name), **family.fields)
        for name, family in FAMILIES.items()
    ]
    return evaluate_with(
        setting.base, tasks, {"tuned": setting.adapter}, with_base=True, row_length=96
    )


def test_every_task_is_covered():
    of_labels = {name for name, cls in TASKS.items() if issubclass(cls, ClassificationTask)}
    assert set(FAMILIES) | of_labels == set(task_names())  # theirs are in tasks/test_glue.py


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_and_answers(setting, name):
    """Prompts word by word. The reference below uses the same texts."""
    family = FAMILIES[name]
    task = make_task(TASKS[name], name, path=str(setting.data / name), **family.fields)
    texts = [
        (q.preface + q.prompt, list(q.labels), [tuple(c) for c in q.choices], q.answer)
        for q in task.questions()
    ]
    assert texts == family.expected


@pytest.mark.parametrize("model", ["base", "tuned"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_answers_and_accuracies(setting, evaluation, name, model):
    reference = setting.reference if model == "base" else setting.reference_adapted
    tokenizer = setting.tokenizer
    outcomes = {o.protocol: o for o in evaluation.outcomes if (o.model, o.task) == (model, name)}
    assert set(outcomes) == {"labels", "choices"}
    picked = {"label_acc": [], "acc": [], "acc_norm": []}
    answers = []
    for index, (prompt, labels, choices, answer) in enumerate(FAMILIES[name].expected):
        answers.append(answer)
        by_label = label_scores(reference, tokenizer, prompt, labels)
        record = outcomes["labels"].examples[index]
        # What all labels begin with is not scored, so that scores may lack what it costs.
        relative = np.array(record["scores"]) - record["scores"][0]
        np.testing.assert_allclose(relative, by_label - by_label[0], rtol=0, atol=FLOAT32_LOGITS)
        if labels[0] == "A":  # one token each, which is when the reference's way is defined
            as_reference = label_logits(reference, tokenizer, prompt, labels)
            assert record["picked"]["label_acc"] == as_reference.argmax()
        picked["label_acc"].append(by_label.argmax())

        by_choice = choice_scores(reference, tokenizer, choices)
        record = outcomes["choices"].examples[index]
        np.testing.assert_allclose(
            per_character(np.array(record["scores"]), choices),
            per_character(by_choice, choices),
            rtol=0,
            atol=FLOAT32_LOGITS,
        )
        picked["acc"].append(by_choice.argmax())
        picked["acc_norm"].append(per_character(by_choice, choices).argmax())
        assert record["answer"] == answer
    for measure, expected in picked.items():
        outcome = outcomes["labels" if measure == "label_acc" else "choices"]
        assert [example["picked"][measure] for example in outcome.examples] == expected
        accuracy = outcome.accuracies[measure]
        assert accuracy.questions == len(answers)
        assert accuracy.correct == sum(p == a for p, a in zip(expected, answers, strict=True))


def test_adapter_and_measures_matter(evaluation):
    def picks(model, measure):
        return [
            example["picked"][measure]
            for o in evaluation.outcomes
            if o.model == model and measure in o.accuracies
            for example in o.examples
        ]

    assert picks("base", "acc") != picks("tuned", "acc")
    assert picks("base", "label_acc") != picks("tuned", "label_acc")
    assert picks("base", "acc") != picks("base", "acc_norm")


def test_subjects_are_counted_separately(evaluation):
    (outcome,) = (
        o
        for o in evaluation.outcomes
        if (o.model, o.task, o.protocol) == ("base", "mmlu", "choices")
    )
    parts = outcome.subjects["acc"]
    assert {name: part.questions for name, part in parts.items()} == {"easy maths": 1, "history": 1}
    assert sum(part.correct for part in parts.values()) == outcome.accuracies["acc"].correct
    others = [o for o in evaluation.outcomes if o.task != "mmlu"]
    assert not any(o.subjects for o in others)
