"""Whole runs of preference training on a tiny base: records, resuming, references, sweeps."""

import dataclasses
import json
import math
import shutil
import signal

import numpy as np
import pytest
from one_device import one_device
from preference_run import write_inputs
from tiny_run import final_adapter, metric_lines, read_config
from tolerances import FLOAT32_LOGITS

import moe_jax
from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.cli import _signals_unwind
from moe_jax.config.command_line import load_config_file
from moe_jax.config.metric_names import METRICS
from moe_jax.errors import CheckpointError
from moe_jax.training.run import reference_scores
from moe_jax.training.run.inputs import Progress
from moe_jax.training.run.loop import train
from moe_jax.training.step.program import Program

MEASURES = {
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",
    "log_prob_chosen",
    "log_prob_rejected",
    "reference_kl",
}


@pytest.fixture(scope="module", autouse=True)
def single_device():
    with one_device():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """Work directory and output of a run of DPO on the base."""
    workdir, said = tmp_path_factory.mktemp("finished") / "run", []
    train(read_config(inputs), workdir, said.append)
    return workdir, "\n".join(said)


def test_records(finished):
    workdir, said = finished
    lines = metric_lines(workdir)
    steps = [line for line in lines if "default/loss" in line]
    validation = [line for line in lines if "validation/default/held_out/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validation] == [0, 2, 4, 6]
    for prefix, found in (("default", steps), ("validation/default/held_out", validation)):
        for line in found:
            assert {f"{prefix}/{name}" for name in MEASURES} <= line.keys()
            margin = line[f"{prefix}/reward_chosen"] - line[f"{prefix}/reward_rejected"]
            assert line[f"{prefix}/reward_margin"] == pytest.approx(margin, abs=FLOAT32_LOGITS)
    assert METRICS.keys() >= MEASURES
    first = validation[0]
    assert first["validation/default/held_out/reward_margin"] == 0.0
    assert first["validation/default/held_out/reference_kl"] == 0.0
    assert steps[0]["default/reward_margin"] == steps[0]["default/reference_kl"] == 0.0
    assert first["validation/default/held_out/loss"] == pytest.approx(math.log(2), rel=1e-5)
    last = validation[-1]
    assert last["validation/default/held_out/reward_margin"] > 0.01
    assert last["validation/default/held_out/reward_accuracy"] == 1.0
    assert "scoring the answers of 25 examples by the reference of 'default'" in said
    (printed,) = (line for line in said.splitlines() if line.startswith("step 6  validation"))
    for name in ("loss", "reward_margin", "reward_accuracy", "reference_kl"):
        assert f"  {name} " in printed
    assert (workdir / "rewards_default.png").read_bytes().startswith(b"\x89PNG")
    saved = load_adapter(workdir / "adapters" / "default")
    assert saved.training.preference["name"] == "dpo"
    assert saved.training.validation_metrics["held_out"].keys() == MEASURES
    assert set(saved.pictures) == {"loss.png", "rewards.png"}
    assert load_adapter(workdir / "best" / "default").step == 6


def test_scores_are_cached(inputs, finished, tmp_path):
    said = []
    train(read_config(inputs, training__steps=1), tmp_path / "run", said.append)
    assert "scoring" not in "\n".join(said)
    config = read_config(inputs, training__steps=1, compute__attention="xla")
    train(config, tmp_path / "other_kernel", said.append)
    assert "scoring" in "\n".join(said)


@pytest.mark.parametrize("keeps_cache", [True, False])
def test_a_resumed_run_ends_with_the_same_bits(inputs, finished, tmp_path, keeps_cache):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.rmtree(workdir / "adapters")
    cache = tmp_path / "cache"
    if keeps_cache:
        shutil.copytree(inputs.parent / "cache", cache)
    said = []
    train(with_cache(read_config(inputs), cache), workdir, said.append)
    assert "resumed at step 3" in said
    assert ("scoring" in "\n".join(said)) is not keeps_cache
    expected = final_adapter(finished[0])
    for path, leaf in final_adapter(workdir).items():
        np.testing.assert_array_equal(leaf, expected[path])
    assert metric_lines(workdir) == metric_lines(finished[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_scoring_that_a_signal_ends_goes_on_where_it_was(
    inputs, finished, tmp_path, monkeypatch, number
):
    monkeypatch.setattr(reference_scores, "CHUNK_EXAMPLES", 4)  # a batch, of 20 and 5 examples
    answer_step, scored = Program.answer_step, []

    def signalled(*arguments):
        scored.append(arguments)
        if len(scored) == 4:
            signal.raise_signal(number)
        return answer_step(*arguments)

    monkeypatch.setattr(Program, "answer_step", signalled)
    config = with_cache(read_config(inputs), tmp_path / "cache")
    said = []
    with pytest.raises((KeyboardInterrupt, SystemExit)), _signals_unwind(own_process=False):
        train(config, tmp_path / "run", said.append)
    assert said[-1] == (
        "stopped before a step was made; the scores of 12 of 25 examples are kept; "
        "run the same command to go on"
    )
    train(config, tmp_path / "run", said.append)
    assert "scoring the answers of 13 examples by the reference of 'default'" in said
    expected = final_adapter(finished[0])
    for path, leaf in final_adapter(tmp_path / "run").items():
        np.testing.assert_array_equal(leaf, expected[path])
    assert metric_lines(tmp_path / "run") == metric_lines(finished[0])


def with_cache(config, folder):
    """The configuration with another cache of data."""
    adapters = {
        name: dataclasses.replace(
            adapter, data=dataclasses.replace(adapter.data, cache_dir=str(folder))
        )
        for name, adapter in config.adapters.items()
    }
    return dataclasses.replace(config, adapters=adapters)


def started(inputs, start, **preference):
    raw = load_config_file(str(inputs))
    adapter = raw["adapters"]["default"]
    adapter["start_from"] = str(start)
    adapter["preference"] |= {"reference": "start", **preference}
    raw["training"] |= {"steps": 3}
    return raw


def test_the_start_as_reference(inputs, finished, tmp_path):
    """Before the first step the adapter is its reference; scores of both kinds train it equally."""
    start = shutil.copytree(finished[0] / "adapters" / "default", tmp_path / "start")
    adapters = {}
    for when in ("cached", "step"):
        workdir = tmp_path / when
        moe_jax.train(started(inputs, start, reference_log_probs=when), workdir)
        line = metric_lines(workdir)[0]
        for name in ("reward_margin", "reference_kl"):
            assert abs(line[f"validation/default/held_out/{name}"]) < FLOAT32_LOGITS
        adapters[when] = final_adapter(workdir)
    changed = 0.0
    for path, leaf in adapters["cached"].items():
        np.testing.assert_allclose(leaf, adapters["step"][path], rtol=0, atol=FLOAT32_LOGITS)
        changed = max(changed, np.abs(leaf - final_adapter(finished[0])[path]).max())
    assert changed > 100 * FLOAT32_LOGITS

    # A run whose scores are gone needs the reference that it began with.
    workdir = tmp_path / "cached"
    shutil.rmtree(workdir / "adapters")
    raw = started(inputs, start)
    raw["training"]["steps"] = 6
    raw["adapters"]["default"]["data"]["cache_dir"] = str(tmp_path / "empty")
    other = load_adapter(start)
    shutil.rmtree(start)
    model = moe_jax.AdaptedModel(moe_jax.load_base(inputs.parent / "base"), {"x": other.method})
    model.save("x", start)
    with pytest.raises(CheckpointError, match=r"start_from: the adapter changed since the run"):
        moe_jax.train(raw, workdir)


def test_a_sweep_over_beta_and_rate_beside_kto_and_sft(inputs, tmp_path):
    raw = load_config_file(str(inputs))
    config = load_config_file(str(inputs))
    sft = config["adapters"]["default"]
    del sft["preference"]
    sft["data"]["train"] = {"words": {"path": str(inputs.parent / "train.jsonl")}}
    sft["data"]["validation"] = {}
    feedback = load_config_file(str(inputs))["adapters"]["default"]
    feedback["preference"] = {"name": "kto", "sft_weight": 0.5, "keep_best": "accuracy"}
    feedback["data"]["train"] = {"answers": {"path": str(inputs.parent / "feedback.jsonl")}}
    feedback["data"]["validation"] = {
        "held": {"path": str(inputs.parent / "held_out_feedback.jsonl")}
    }
    raw["adapters"] |= {"sft": sft, "kto": feedback}
    raw["sweep"] = {
        "adapter": "default",
        "grid": {"preference.beta": (0.1, 1.0), "optimizer.learning_rate": (1e-3, 1e-2)},
    }
    raw["training"] |= {"steps": 2}
    result = moe_jax.train(raw, tmp_path / "run")
    swept = [
        f"default-beta={beta}-learning_rate={rate}" for beta in (0.1, 1.0) for rate in (0.001, 0.01)
    ]
    assert set(result.adapters) == {*swept, "sft", "kto"}
    lines = metric_lines(tmp_path / "run")
    last = [line for line in lines if "sft/loss" in line][-1]
    margins = [last[f"{name}/reward_margin"] for name in swept]
    # The step is about the same for both betas, and the reward ten times as large.
    assert margins[2] / margins[0] == pytest.approx(10, rel=0.5)
    assert margins[3] / margins[1] == pytest.approx(10, rel=0.5)
    assert "sft/reward_margin" not in last and "sft/first_token_loss" in last
    total = last["kto/preference_loss"] + 0.5 * last["kto/sft_loss"]
    assert last["kto/loss"] == pytest.approx(total, rel=1e-5)
    held_out = [line for line in lines if "validation/kto/held/loss" in line]
    assert held_out[0]["validation/kto/held/preference_loss"] == pytest.approx(0.5, rel=1e-4)
    best = load_adapter(tmp_path / "run" / "best" / "kto").training
    accuracies = [line["validation/kto/held/reward_accuracy"] for line in held_out[1:]]
    assert best.best_accuracy == max(accuracies)
    table = json.loads((tmp_path / "run" / "adapters.json").read_text())
    found = {line["adapter"]: line["best_accuracy"] for line in table}
    assert found["kto"] == best.best_accuracy and found["sft"] is None
    assert f"(accuracy {best.best_accuracy:.4f})" in (tmp_path / "run" / "adapters.md").read_text()


def test_the_best_adapter_by_accuracy():
    progress = Progress(0, {}, {})
    assert progress.is_best("a", 0.7, 0.5)
    assert not progress.is_best("a", 0.6, 0.4)
    assert progress.is_best("a", 0.65, 0.5)
    assert progress.is_best("a", 0.9, 0.75)
    assert (progress.best, progress.best_accuracy) == ({"a": 0.9}, {"a": 0.75})
    assert progress.is_best("b", 0.7, None)
    assert not progress.is_best("b", 0.7, None)
    assert "b" not in progress.best_accuracy
