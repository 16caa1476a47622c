"""Evaluation on tasks in a training run: between steps and at the end, on the mesh of the run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_run import metric_lines
from tolerances import ROUNDING
from xla_flags import xla_flags

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.training_record import read_record
from moe_jax.config.run import parse_run_config
from moe_jax.demo.corpus import write_tasks
from moe_jax.errors import UserError
from moe_jax.evaluation.scorer import Scorer
from moe_jax.evaluation.training_evaluator import TrainingTaskEvaluation, TrainingTaskEvaluator
from moe_jax.hf.base_model import open_base
from moe_jax.sharding.mesh import make_mesh
from moe_jax.training.run import inputs, loop, start_up
from moe_jax.training.step import program

TASKS = ("colour", "opposite")
STEPS, EVERY, FEW, LIMIT = 4, 2, 5, 12
MODELS = ("base", "lora", "mixlora")
DEVICES = jax.devices()[:2]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder, seed=0)
    return folder


def _config(tasks, evaluation=None, **fields):
    """`configs/tiny_multitask.py` with fewer steps, and LoRA as a second adapter."""
    from configs import tiny_multitask

    raw = tiny_multitask.get_config().to_dict()
    raw |= {"train_only": None, "tasks_folder": str(tasks), **fields}
    raw["training"] = {"steps": STEPS, "log_every": 2}
    raw["mesh"] = {"data": 1, "fsdp": 2}
    for adapter in raw["adapters"].values():
        adapter["batch_size"] = 4
        adapter["optimizer"] = {"learning_rate": 1e-2, "schedule": {"kind": "constant"}}
        adapter["data"]["train"] = {task: adapter["data"]["train"][task] for task in TASKS}
        tasks_and_limits = {"tasks": TASKS, "every": EVERY, "limit": LIMIT, "limit_between": FEW}
        adapter["evaluation"] |= tasks_and_limits | {"batch_size": 2} | (evaluation or {})
    return parse_run_config(raw, METHODS)


def _train(config, workdir, lines=None):
    """Trains on a mesh of two devices."""
    say = (lambda line: None) if lines is None else lines.append
    with pytest.MonkeyPatch.context() as patch:
        for module in (inputs, program):
            patch.setattr(module, "make_mesh", lambda mesh, _=None: make_mesh(mesh, DEVICES))
        return loop.train(config, workdir, say, TrainingTaskEvaluation())


@pytest.fixture(scope="module")
def run(tasks, tmp_path_factory):
    """A whole run: folder, result, printed lines, and compilations of each scorer."""
    workdir, lines, scorers = tmp_path_factory.mktemp("run"), [], []
    init = Scorer.__init__

    def remembering(self, *arguments, **fields):
        init(self, *arguments, **fields)
        scorers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "__init__", remembering)
        result = _train(_config(tasks), workdir, lines)
    return workdir, result, lines, [scorer.compilations() for scorer in scorers]


def _predictions(folder: Path) -> dict[str, list[dict]]:
    """Records of all questions, by model and task."""
    records = {}
    for file in sorted((folder / "predictions").rglob("*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        records[f"{file.parent.name}/{file.name.split('.')[0]}"] = lines[1:]
    return records


def test_evaluate_command_reproduces_the_results_of_training(run, tasks, tmp_path):
    workdir, result, *_ = run
    command = [sys.executable, "-m", "moe_jax.cli", "evaluate", "--base", "moe_jax/demo/base"]
    command += ["--with-base", "--tasks", ",".join(TASKS), "--data", tasks, "--limit", LIMIT]
    command += ["--adapter", workdir / "adapters" / "mixlora", "--protocols", "choices"]
    command += ["--row-length", "32", "--output", tmp_path]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(devices=1)}
    subprocess.run([str(part) for part in command], check=True, env=environment)

    reported = json.loads((workdir / "evaluation" / "results.json").read_text())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["results"] == [one for one in reported["results"] if one["model"] != "lora"]
    assert results["averages"] == [one for one in reported["averages"] if one["model"] != "lora"]
    assert [model["name"] for model in reported["models"]] == list(MODELS)

    before, after = _predictions(workdir / "evaluation"), _predictions(tmp_path)
    assert before.keys() == {f"{model}/{task}" for model in MODELS for task in TASKS}
    for name, examples in after.items():
        assert len(examples) == LIMIT
        for one, two in zip(examples, before[name], strict=True):
            np.testing.assert_allclose(one["scores"], two["scores"], **ROUNDING)
            assert {**one, "scores": None} == {**two, "scores": None}
    # The three models say different things.
    for one, other in (("base", "lora"), ("lora", "mixlora")):
        assert not np.allclose(
            before[f"{one}/colour"][0]["scores"], before[f"{other}/colour"][0]["scores"], **ROUNDING
        )
    share = sum(e["picked"]["acc"] == e["answer"] for e in before["mixlora/colour"]) / LIMIT
    assert result.evaluation.scores("mixlora")["colour/acc"].value == share


def test_recorded_accuracies(run):
    workdir, _, lines, compilations = run
    measured = {}
    for line in metric_lines(workdir):
        for name, value in line.items():
            if name.startswith("evaluation/") and name.endswith("/acc"):
                measured[line["step"], name.removeprefix("evaluation/")] = value
    names = [f"{model}/{task}/acc" for model in ("lora", "mixlora") for task in TASKS]
    assert measured.keys() == {(step, name) for step in (0, 2, 4) for name in names}
    records = _predictions(workdir / "evaluation")
    for name in names:
        model, task, _ = name.split("/")
        right = {
            m: [e["picked"]["acc"] == e["answer"] for e in records[f"{m}/{task}"]] for m in MODELS
        }
        # An untrained adapter equals the base; before the end, fewer questions are scored.
        assert measured[0, name] == np.mean(right["base"][:FEW])
        assert measured[4, name] == np.mean(right[model])
        record = read_record(workdir / "adapters" / model)
        assert record.accuracies_step == STEPS
        assert record.accuracies[task]["acc"] == np.mean(right[model])
    shown = [line for line in lines if line.startswith("step 2  evaluation mixlora/colour  ")]
    assert len(shown) == 1
    assert f"acc {100 * measured[2, 'mixlora/colour/acc']:.1f} ± " in shown[0]
    # The base, LoRA and MixLoRA; never again after the first time.
    assert compilations == [3]


def test_results_table(run):
    workdir, result, lines, _ = run
    table = (workdir / "evaluation" / "results.md").read_text()
    assert table == result.evaluation.to_markdown()
    assert table in lines
    rows = [line.split(" | ")[0].lstrip("| ") for line in table.splitlines() if line[:1] == "|"]
    differences = [f"{model} - {MODELS[0]}" for model in MODELS[1:]]
    assert rows == 2 * ["model", "---", "questions", *MODELS, *differences]
    assert f"| questions | {LIMIT} | {LIMIT} |  |" in table
    saved = json.loads((workdir / "evaluation" / "results.json").read_text())
    assert saved["evaluation"]["mixlora"]["tasks"] == list(TASKS)
    colour = saved["results"][0]["measures"]["acc"]
    p = colour["correct"] / LIMIT
    assert colour["standard_error"] == pytest.approx((p * (1 - p) / LIMIT) ** 0.5)


def test_interrupted_final_evaluation_resumes(run, tasks, tmp_path, monkeypatch):
    workdir, *_ = run
    again = tmp_path / "run"
    shutil.copytree(workdir, again)
    config = _config(tasks)
    assert _train(config, again).was_already_complete
    shutil.rmtree(again / "evaluation")
    adapters = {file: file.stat().st_mtime_ns for file in (again / "adapters").rglob("*")}

    start, batches = Scorer._start, []

    def interrupted(self, *arguments):
        batches.append(arguments)
        if len(batches) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return start(self, *arguments)

    monkeypatch.setattr(Scorer, "_start", interrupted)
    lines = []
    result = _train(config, again, lines)
    assert (result.interrupted_by, result.evaluation) == (signal.SIGINT, None)
    assert lines[-1] == "stopped while evaluating; run the same command to resume"
    assert not (again / "evaluation" / "results.json").exists()
    stopped_after = len(batches)
    result = _train(config, again)
    assert result.evaluation is not None
    # Nothing is trained twice, and few questions are scored twice.
    assert {file: file.stat().st_mtime_ns for file in (again / "adapters").rglob("*")} == adapters
    assert _predictions(again / "evaluation") == _predictions(workdir / "evaluation")
    assert metric_lines(again) == metric_lines(workdir)
    assert _train(config, again).was_already_complete
    computed = len(batches)
    shutil.rmtree(again / "evaluation")
    assert _train(config, again).evaluation is not None
    at_once = len(batches) - computed
    assert stopped_after < at_once <= computed < at_once + 4


@pytest.mark.parametrize(("evaluations", "step"), [(1, 0), (3, 2)])
def test_interrupted_evaluation_between_steps_resumes(
    run, tasks, tmp_path, monkeypatch, capfd, evaluations, step
):
    """The second adapter's evaluation is interrupted; a resumed run evaluates it first."""
    workdir, config, calls = tmp_path / "run", _config(tasks), []
    measure = TrainingTaskEvaluator.measure

    def interrupted(self, name, *arguments):
        calls.append(name)
        if len(calls) == evaluations + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingTaskEvaluator, "measure", interrupted)
        result = _train(config, workdir)
    assert (result.step, result.interrupted_by) == (step, signal.SIGINT)
    assert "SIGINT: stopping after this batch of questions" in capfd.readouterr().err
    assert _train(config, workdir).evaluation is not None
    assert metric_lines(workdir) == metric_lines(run[0])
    assert _predictions(workdir / "evaluation") == _predictions(run[0] / "evaluation")


@pytest.mark.parametrize(
    ("evaluation", "fields", "message"),
    [
        ({"tasks": ("color",)}, {}, "config.adapters.lora.evaluation.tasks: .*mean 'colour'"),
        ({"tasks": ()}, {}, "config.adapters.lora.evaluation.tasks: is empty"),
        ({"tasks": ("sum", "sum")}, {}, "evaluation.tasks: names sum more than once"),
        ({"protocols": ("label",)}, {}, r"evaluation.protocols\[0\]: .*mean 'labels'"),
        ({"protocols": ("labels",)}, {}, "evaluation: task 'colour': has no labels; use"),
        ({"split": "dev"}, {}, "evaluation: .*colour: no file is named after the split 'dev'"),
        ({"tasks": ("boolq",)}, {}, "evaluation.tasks: .*boolq: no such folder for the task"),
        ({"every": -1}, {}, "evaluation.every: must not be negative"),
        ({}, {"tasks_folder": "/nowhere"}, "data.train.colour: task 'colour': unknown task"),
    ],
)
def test_invalid_evaluation_is_rejected_before_weights_are_read(
    evaluation, fields, message, tasks, tmp_path, monkeypatch
):
    monkeypatch.setattr(start_up, "load_base_params", None)
    with pytest.raises(UserError, match=message):
        _train(_config(tasks, evaluation, **fields), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_conflicting_adapters_are_rejected(tasks):
    config = _config(tasks)
    lora, mixlora = config.adapters["lora"], config.adapters["mixlora"]
    assert lora.evaluation is not None
    other = replace(lora, evaluation=replace(lora.evaluation, limit=LIMIT + 1))
    for adapters, message in (
        (
            {"lora": other, "mixlora": mixlora},
            "mixlora.evaluation: task 'colour' has another split, limit",
        ),
        ({"base": lora}, "config.adapters.base: is the name of the base in results"),
    ):
        inputs = SimpleNamespace(base=open_base("moe_jax/demo/base"))
        program = SimpleNamespace(model=None, mesh=None)
        with pytest.raises(UserError, match=message):
            TrainingTaskEvaluation().prepare(replace(config, adapters=adapters), inputs, program)
