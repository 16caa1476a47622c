"""Whole runs on a tiny base: files, metrics and adapters."""

import json
import math

import jax
import numpy as np
import pytest
import torch
import transformers
from tiny_run import Run, final_adapter, metric_lines, write_inputs
from tolerances import FLOAT32_LOGITS, ROUNDING

from moe_jax.checkpoints.adapter_files import load_adapter
from moe_jax.checkpoints.store import TrainingStore
from moe_jax.config.metric_names import METRICS
from moe_jax.hf.base_content import base_fingerprint
from moe_jax.training.records.metric_lines import read_metrics

# Two adapters with different data; only initialization and the order of rows are random.
TWO_ADAPTERS = """

def get_config():
    method = dict(name="mixlora", num_experts=4)
    adapters = {"default": adapter("train", **method), "second": adapter("other", **method)}
    for each in adapters.values():
        each["method"]["dropout"] = 0.0
        each["data"]["buckets"] = ()
    adapters["second"]["batch_size"] = 4
    adapters["second"]["data"]["max_length"] = 20
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32"),
        adapters={name: adapters[name] for name in NAMES},
        training=dict(steps=3, log_every=1, seed=3),
    )
"""

ONE_LENGTH = {"adapters__default__data__buckets": "()"}
"""One compilation instead of two."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    run = Run(inputs, tmp_path_factory.mktemp("finished") / "run")
    assert run.join() == 0, run.log.read_text()
    return run


def completed(config, workdir, **overrides):
    run = Run(config, workdir, overrides=overrides)
    assert run.join() == 0, run.log.read_text()
    return run


def refused(config, workdir, **overrides):
    run = Run(config, workdir, overrides=overrides)
    assert run.join() == 2, run.log.read_text()
    log = run.log.read_text()
    assert "Traceback" not in log
    return log[log.index("error: ") :].rstrip("\n")


CUDNN = {"compute__dtype": "bfloat16", "compute__attention": "cudnn"}


def test_a_gpu_kernel_is_invalid_on_a_cpu_before_data_is_read(inputs, tmp_path):
    error = refused(
        inputs,
        tmp_path / "run",
        **CUDNN,
        adapters__default__data__train__words__path="no_data.jsonl",
    )
    words = "'cudnn' needs an NVIDIA GPU, and jax runs on a cpu; use 'auto' or 'xla'"
    assert error == f"error: config.compute.attention: {words}"
    assert not (tmp_path / "run").exists()


def test_a_gpu_kernel_is_invalid_on_a_cpu_with_worker_processes(inputs, tmp_path):
    error = refused(
        inputs,
        tmp_path / "run",
        **CUDNN,
        adapters__default__data__num_workers=1,
    )
    assert error.startswith("error: config.compute.attention: 'cudnn' needs an NVIDIA GPU")


def test_files_of_a_run(finished, inputs):
    workdir = finished.workdir
    kept = sorted(p.name for p in workdir.iterdir() if not p.name.startswith("."))
    pictures = ["experts_default.png", "loss.png"]
    folders = ["adapters", "best", "checkpoints", "config.json"]
    assert kept == sorted([*folders, *pictures, "metrics.jsonl"])
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["25", "30"]
    assert json.loads((workdir / "config.json").read_text())["training"]["steps"] == 30

    saved = load_adapter(workdir / "adapters" / "default")
    assert saved.step == 30
    assert saved.method.num_experts == 4
    assert saved.model.num_layers == 2
    assert saved.base.fingerprint == base_fingerprint(inputs.parent / "base")
    assert all(np.any(leaf) for leaf in final_adapter(workdir).values())


def test_each_long_stage_before_the_first_step_is_announced(finished):
    lines = finished.log.read_text().splitlines()
    words = ("compiling the step", "loading the weights", "measuring the validation loss", "step ")
    places = [next(n for n, line in enumerate(lines) if line.startswith(word)) for word in words]
    assert places == sorted(places)
    assert sum(line.startswith("measuring the validation loss") for line in lines) == 1


def test_the_training_record(finished, inputs):
    lines = metric_lines(finished.workdir)
    losses = [line["default/loss"] for line in lines if "default/loss" in line]
    held_out = [v for line in lines for k, v in line.items() if k.startswith("validation/")]
    for folder in ("adapters", "best"):
        saved = load_adapter(finished.workdir / folder / "default")
        record = saved.training
        assert record.step == record.total_steps == 30
        assert record.method["num_experts"] == 4
        assert record.optimizer["schedule"]["warmup_steps"] == 2
        assert (record.batch_size, record.max_length, record.seed) == (8, 24, 3)
        (words,) = record.train.values()
        assert (words.path, words.rows) == (str(inputs.parent / "train.jsonl"), 100)
        assert not words.on_hub
        assert record.validation["held_out"].rows == 11
        assert record.training_loss == losses[-1]
        assert record.validation_losses == {"held_out": held_out[-1]}
        assert record.best_loss == min(held_out[1:])
        assert list(saved.pictures) == ["loss.png", "experts.png"]
        assert all(picture.startswith(b"\x89PNG") for picture in saved.pictures.values())


def test_every_metric_of_a_run_is_in_the_table(finished):
    lines = read_metrics(finished.workdir / "metrics.jsonl")
    times = {
        "peak_resident_bytes",
        "elapsed_seconds",
        "seconds_per_step",
        "tokens_per_second",
        "model_tflops_per_second",
        "mfu",
        "host_share",
    }
    assert set().union(*(line.pop("time") for line in lines)) == times
    names = set().union(*lines) - {"step", "validation/default/held_out/loss"}
    router_losses = {"default/load_balance"}
    for name in names - router_losses:
        adapter, _, kind = name.rpartition("/")
        assert adapter in ("", "default") and kind in METRICS, name


def test_the_loss_decreases(finished):
    lines = metric_lines(finished.workdir)
    losses = [line["default/loss"] for line in lines if "default/loss" in line]
    held_out = [v for line in lines for k, v in line.items() if k.startswith("validation/")]
    assert losses[-1] < losses[0] - 0.1
    assert len(held_out) == 4
    assert held_out == sorted(held_out, reverse=True)


def test_the_best_adapter_is_kept(inputs, tmp_path):
    # A learning rate at which the loss soon increases again.
    run = completed(
        inputs,
        tmp_path / "run",
        training__eval_every=2,
        checkpoints__every=2,
        checkpoints__keep=100,
        adapters__default__optimizer__learning_rate=10.0,
        **ONE_LENGTH,
    )
    name = "validation/default/held_out/loss"
    losses = {line["step"]: line[name] for line in metric_lines(run.workdir) if name in line}
    best = load_adapter(run.workdir / "best" / "default")
    assert losses[best.step] == min(losses.values())
    assert best.step < 30, "the best adapter is not the last one, or this test shows nothing"
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), best.tree
    )
    with TrainingStore(run.workdir / "checkpoints", every=2, keep=100) as store:
        saved = store.restore_adapters(best.step, {"default": target})["default"]
    jax.tree.map(np.testing.assert_array_equal, best.tree, saved)


def test_steps_of_the_lines(finished):
    lines = metric_lines(finished.workdir)
    assert [line["step"] for line in lines] == [0, 4, 8, 10, 12, 16, 20, 20, 24, 28, 30, 30]
    measured = [line["step"] for line in lines if "validation/default/held_out/loss" in line]
    assert measured == [0, 10, 20, 30]


def test_a_line_aggregates_its_steps(finished, inputs, tmp_path):
    every = metric_lines(completed(inputs, tmp_path / "run", training__log_every=1).workdir)
    steps = {line["step"]: line for line in every if "default/loss" in line}
    lines = [line for line in metric_lines(finished.workdir) if "default/loss" in line]
    first = 1
    for line in lines:
        window = [steps[i] for i in range(first, line["step"] + 1)]
        for name in ("default/loss", "default/load_balance", "default/grad_norm", "padding_share"):
            mean = math.fsum(step[name] for step in window) / len(window)
            assert line[name] == pytest.approx(mean, rel=1e-12)
        total = sum(step["default/target_tokens"] for step in window)
        assert line["default/target_tokens"] == total
        assert line["default/learning_rate"] == window[-1]["default/learning_rate"]
        first = line["step"] + 1
    # Two steps of warm-up from 0 to 5e-3, then 28 of a cosine down to 0.
    rates = [steps[i]["default/learning_rate"] for i in (1, 2, 3, 17)]
    assert rates == pytest.approx([0.0, 2.5e-3, 5e-3, 2.5e-3], rel=1e-6)


def test_validation_loss_equals_transformers(inputs, tmp_path):
    # One step with a vanishing learning rate: B stays zero, so that the model equals the base.
    run = completed(
        inputs,
        tmp_path / "run",
        training__steps=1,
        adapters__default__optimizer__learning_rate=1e-30,
        adapters__default__optimizer__schedule__warmup_steps=0,
        **ONE_LENGTH,
    )
    losses = [
        value
        for line in metric_lines(run.workdir)
        for name, value in line.items()
        if name == "validation/default/held_out/loss"
    ]
    base = inputs.parent / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for text in (inputs.parent / "held_out.jsonl").read_text().splitlines():
        row = json.loads(text)
        prompt = tokenizer(row["prompt"]).input_ids
        whole = tokenizer(row["prompt"] + row["completion"]).input_ids
        assert whole[: len(prompt)] == prompt, "the completion is ambiguous otherwise"
        ids = [*whole, tokenizer.eos_token_id][:24]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(len(prompt), len(ids)):
            total -= log_probs[position - 1, ids[position]].item()
            count += 1
    # Before training and after.
    assert losses == pytest.approx([total / count] * 2, abs=FLOAT32_LOGITS)


def test_two_adapters(inputs, tmp_path):
    both, alone = inputs.with_name("two.py"), inputs.with_name("one.py")
    both.write_text(inputs.read_text() + TWO_ADAPTERS + '\n\nNAMES = ("default", "second")\n')
    alone.write_text(inputs.read_text() + TWO_ADAPTERS + '\n\nNAMES = ("default",)\n')
    two, one = completed(both, tmp_path / "two"), completed(alone, tmp_path / "one")
    assert final_adapter(two.workdir, "second").keys() == final_adapter(two.workdir).keys()
    assert len(list((two.workdir / "adapters").iterdir())) == 2
    pairs = zip(metric_lines(two.workdir), metric_lines(one.workdir), strict=True)
    for line, expected in pairs:
        for name in ("default/loss", "default/target_tokens"):
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=ROUNDING["rtol"])
    held_out = {k for line in metric_lines(two.workdir) for k in line if "validation" in k}
    assert held_out == {f"validation/{n}/held_out/loss" for n in ("default", "second")}


def test_epochs(inputs, tmp_path):
    # 100 rows in batches of 8: half of them are 6.25 batches.
    run = completed(
        inputs, tmp_path / "run", training__steps=None, training__epochs=0.5, **ONE_LENGTH
    )
    assert metric_lines(run.workdir)[-1]["step"] == 7


def test_epochs_of_two_adapters(inputs, tmp_path):
    two = inputs.with_name("two_epochs.py")
    epochs = TWO_ADAPTERS.replace("steps=3", "epochs=0.3")
    two.write_text(inputs.read_text() + epochs + '\n\nNAMES = ("default", "second")\n')
    run = completed(two, tmp_path / "run")
    folders = (run.workdir / "adapters").iterdir()
    # 0.3 times 100 rows in batches of 8, and 0.3 times 60 rows in batches of 4.
    assert {f.name: load_adapter(f).step for f in folders} == {"default": 4, "second": 5}


def test_gradients_that_are_never_finite_stop_the_run(inputs, tmp_path):
    error = refused(
        inputs,
        tmp_path / "run",
        compute__dtype="float16",
        training__initial_loss_scale=1e38,
        training__max_skipped_steps=7,
        **ONE_LENGTH,
    )
    assert "adapter 'default': the last 7 gradients, up to step 7, were not finite" in error
    assert "config.adapters.default.optimizer.learning_rate" in error
    assert "the state at step 5 is kept" in error
    assert "\n" not in error


def test_weights_that_are_not_finite_stop_the_run(inputs, tmp_path):
    error = refused(
        inputs,
        tmp_path / "run",
        adapters__default__optimizer__name="sgd",
        # The learning rate of the first step is zero; the second step overflows the weights.
        adapters__default__optimizer__learning_rate=1e38,
        adapters__default__optimizer__weight_decay=1e9,
        checkpoints__every=1,
        training__max_skipped_steps=1000,
        **ONE_LENGTH,
    )
    assert "are not finite at step 2, so they are not saved" in error
    assert error.count("the state at step 1 is kept") == 1
    assert "\n" not in error
    assert not (tmp_path / "run" / "adapters").exists()
