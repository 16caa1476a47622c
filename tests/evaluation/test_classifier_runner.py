"""Classifiers: training on labeled rows, evaluation, and errors."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_run
from evaluation.conftest import evaluate_with
from one_device import one_device
from tolerances import CLASSIFIER_SCORES, SIX_DIGITS

import moe_jax
from moe_jax import cli
from moe_jax.data.encoding import encode_texts
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import ConfigError, DataError
from moe_jax.training.run.loop import train

RNG = np.random.default_rng(0)


def sentence(extra):
    words = [*RNG.choice([w for w in tiny_run.WORDS if w not in ("red", "blue")], 3), *extra]
    return " ".join(RNG.permutation(words))


def write_tasks(folder):
    """Writes two tasks: `red` or `blue` as a mood, and the number of reds."""
    for split, count in (("train", 160), ("validation", 40)):
        moods, numbers = [], []
        for index in range(count):
            label = index % 2
            moods.append({"sentence": sentence([("red", "blue")[label]]), "label": label})
            reds = index % 5
            second = " ".join(["red"] * reds + ["blue"] * (4 - reds))
            row = {"sentence1": sentence([]), "sentence2": second, "label": float(reds)}
            numbers.append(row)
        for task, rows in (("sst2", moods), ("stsb", numbers)):
            (folder / task).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A finished run of a classifier, a regression and a language model."""
    folder = tmp_path_factory.mktemp("classifiers")
    config = tiny_run.write_inputs(folder)
    write_tasks(folder / "tasks")
    raw = tiny_run.load_config_file(str(config))
    language_model = raw["adapters"].pop("default")

    def classifier(task, method):
        return {
            "method": {**method, "classification": {"glue": task}},
            "data": {
                "train": {task: {"task": task}},
                "validation": {"held_out": {"task": task, "split": "validation"}},
                "max_length": 24,
            },
            "optimizer": {"learning_rate": 1e-2},
            "batch_size": 16,
        }

    lora = {"name": "lora", "rank": 4, "alpha": 8.0, "target_modules": ["v_proj", "down_proj"]}
    raw["adapters"] = {
        "mood": classifier("sst2", lora),
        "number": classifier("stsb", lora),
        "words": {
            **language_model,
            "method": lora,
            "data": {**language_model["data"], "buckets": ()},
        },
    }
    raw["tasks_folder"] = str(folder / "tasks")
    raw["training"] = {"steps": 40, "log_every": 10, "eval_every": 20, "seed": 0}
    with one_device():
        printed = []
        train(moe_jax.parse_config(raw), folder / "run", printed.append)
    return folder, printed


def tasks(setting, *names, **options):
    folder, _ = setting
    adapters = {n: folder / "run" / "adapters" / n for n in options.pop("adapters")}
    return evaluate_with(folder / "base", names, adapters, data=folder / "tasks", **options)


@pytest.fixture(scope="module")
def evaluation(setting):
    return tasks(
        setting, "sst2", "stsb", adapters=("mood", "number"), output=setting[0] / "evaluation"
    )


def test_training_learns_and_records_metrics(setting):
    folder, printed = setting
    lines = tiny_run.metric_lines(folder / "run")
    measured = [line for line in lines if "validation/mood/held_out/accuracy" in line]
    assert [line["step"] for line in measured] == [0, 20, 40]
    first, last = measured[0], measured[-1]
    assert first["validation/mood/held_out/accuracy"] < 0.8
    assert last["validation/mood/held_out/accuracy"] > 0.95
    assert last["validation/number/held_out/pearson"] > 0.9
    assert last["validation/number/held_out/loss"] < first["validation/number/held_out/loss"] / 4
    assert "validation/words/held_out/accuracy" not in last
    for name, metrics in (
        ("mood", ["accuracy"]),
        ("number", ["pearson", "spearman"]),
        ("words", []),
    ):
        adapter = moe_jax.load_adapter(folder / "run" / "adapters" / name)
        recorded = adapter.training.validation_metrics
        values = {metric: last[f"validation/{name}/held_out/{metric}"] for metric in metrics}
        assert recorded == ({"held_out": values} if values else {})
    (line,) = [line for line in printed if line.startswith("step 40  validation mood/held_out")]
    assert "  accuracy " in line


def test_evaluation_matches_the_metrics_of_training(setting, evaluation):
    last = tiny_run.metric_lines(setting[0] / "run")[-1]
    for model, task, metric in (
        ("mood", "sst2", "accuracy"),
        ("number", "stsb", "pearson"),
        ("number", "stsb", "spearman"),
    ):
        reported = last[f"validation/{model}/held_out/{metric}"]
        value = evaluation.accuracy(model, task, metric).value
        assert value == pytest.approx(reported, abs=SIX_DIGITS)
    assert evaluation.accuracy("mood", "sst2", "accuracy").questions == 40
    assert evaluation.accuracy("mood", "stsb", "pearson") is None


def test_scores_are_those_of_the_saved_adapter(setting, evaluation):
    folder, _ = setting
    base, tokenizer = moe_jax.load_base(folder / "base"), load_tokenizer(folder / "base")
    saved = moe_jax.load_adapter(folder / "run" / "adapters" / "mood")
    assert saved.method.classification.labels == ("negative", "positive")
    (outcome,) = [one for one in evaluation.outcomes if one.task == "sst2"]
    rows = [json.loads(line) for line in (folder / "tasks/sst2/validation.jsonl").open()][:6]
    encoded = encode_texts([(row["sentence"], "") for row in rows], tokenizer)
    tokens, real = np.zeros((6, 24), int), np.zeros((6, 24), int)
    for index, ids in enumerate(encoded):
        tokens[index, : len(ids)], real[index, : len(ids)] = ids, 1
    model = moe_jax.AdaptedModel(base, {"mood": saved})
    expected = np.asarray(model(tokens, "mood", real))
    np.testing.assert_allclose(
        [e["scores"] for e in outcome.examples[:6]], expected, atol=CLASSIFIER_SCORES
    )
    names = [saved.method.classification.labels[i] for i in expected.argmax(axis=1)]
    assert [example["picked"] for example in outcome.examples[:6]] == names


def test_labels_in_another_order_mean_the_same(setting, evaluation):
    saved = moe_jax.load_adapter(setting[0] / "run" / "adapters" / "mood")
    labels = saved.method.classification.labels[::-1]
    head = dataclasses.replace(saved.method.classification, glue=None, labels=labels)
    tree = {**saved.tree, "score": {"kernel": saved.tree["score"]["kernel"][:, ::-1]}}
    other = saved._replace(method=dataclasses.replace(saved.method, classification=head), tree=tree)
    folder, _ = setting
    again = evaluate_with(folder / "base", "sst2", {"mood": other}, data=folder / "tasks")
    expected = next(one for one in evaluation.outcomes if one.task == "sst2")
    assert [e["picked"] for e in again.outcomes[0].examples] == [
        e["picked"] for e in expected.examples
    ]


def test_interrupted_classification_resumes(setting, evaluation, monkeypatch):
    file = setting[0] / "evaluation" / "predictions" / "mood" / "sst2.classification.jsonl"
    whole = file.read_text()
    assert len(whole.splitlines()) == 41
    monkeypatch.setattr(
        "moe_jax.evaluation.model_evaluation.Scorer", None
    )  # nothing is left to compute
    options = {"adapters": ("mood", "number"), "output": setting[0] / "evaluation"}
    again = tasks(setting, "sst2", "stsb", **options)
    assert again.to_plain() == evaluation.to_plain()
    monkeypatch.undo()
    file.write_text("".join(whole.splitlines(keepends=True)[:20]))
    tasks(setting, "sst2", "stsb", **options)
    assert file.read_text() == whole
    with pytest.raises(ConfigError, match="other questions"):
        tasks(setting, "sst2", "stsb", limit=3, **options)


def test_classifier_and_language_model_in_one_evaluation(setting):
    both = tasks(setting, "sst2", adapters=("mood", "words"), limit=4, protocols="labels")
    assert both.accuracy("words", "sst2", "label_acc") is not None
    assert both.accuracy("mood", "sst2", "label_acc") is None
    assert both.accuracy("mood", "sst2", "accuracy") is not None
    assert both.accuracy("words", "sst2", "accuracy") is None


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["boolq"], {"adapters": ["mood"]}, "cannot answer the questions of the task 'boolq'"),
        (["stsb"], {"adapters": ["mood"]}, "classifies negative, positive, which no task asks"),
        (["sst2", "stsb"], {"adapters": ["mood"]}, "no adapter classifies a number"),
        (["stsb"], {"adapters": ["words"]}, "asks for a number, which only an adapter with"),
        (["sst2"], {"adapters": ["mood"], "shots": 1}, "classifiers do not use few-shot examples"),
        (["sst2"], {"adapters": ["mood"], "split": "test"}, "no file is named after the split"),
    ],
)
def test_mismatched_classifiers_and_tasks_are_rejected(setting, names, options, words):
    folder, _ = setting
    (folder / "tasks" / "boolq").mkdir(exist_ok=True)
    with pytest.raises((ConfigError, DataError)) as error:
        tasks(setting, *names, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_classifier_is_rejected_by_generate_and_export(setting, tmp_path, capsys):
    adapter, base = str(setting[0] / "run" / "adapters" / "mood"), str(setting[0] / "base")
    to = ["--output", str(tmp_path / "out")]
    assert cli.main(["export", "--adapter", adapter, "--to", "mixlora", *to]) == 2
    assert "the mixlora format cannot express a classifier" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["generate", "--base", base, "--adapter", adapter, "--prompt", "x"]) == 2
    assert "is a classifier (negative, positive); its score head" in capsys.readouterr().err
    assert cli.main(["show", adapter]) == 0
    assert "negative" in capsys.readouterr().out
