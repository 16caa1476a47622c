"""Metrics between the device and their files, and the table of their semantics."""

import contextlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from tensorboardX.proto.event_pb2 import Event

from moe_jax.config.metric_names import METRICS
from moe_jax.config.run import LoggingConfig
from moe_jax.errors import CheckpointError, ConfigError
from moe_jax.training.records.metric_log import (
    PendingMetrics,
    Window,
    last_task_scores,
    last_validation_metrics,
    open_writers,
    require_writers,
    training_losses,
)


def test_pending_metrics_keep_their_distance():
    pending = PendingMetrics(lag=2)
    seen = []
    for step in range(1, 6):
        pending.push(step, {"loss": jnp.float32(step)})
        seen.append([s for s, _ in pending.ready()])
    assert seen == [[], [], [1], [2], [3]]
    assert list(pending.drain()) == [(4, {"loss": 4.0}), (5, {"loss": 5.0})]
    assert list(pending.drain()) == []


def test_window_by_hand():
    nan, inf = float("nan"), float("inf")
    window = Window([{"a/loss": 1.0, "a/target_tokens": 5.0, "a/skipped_total": 0.0, "bad": nan}])
    window.add({"a/loss": 2.0, "a/target_tokens": 7.0, "a/skipped_total": 1.0, "bad": inf})
    window.add({"a/loss": nan, "a/target_tokens": 9.0, "a/skipped_total": 1.0, "bad": nan})
    assert window.close() == {
        "a/loss": 1.5,  # mean of the finite values
        "a/target_tokens": 21.0,
        "a/skipped_total": 1.0,
        "bad": None,
    }
    assert window.steps == []


def test_window_of_lists_by_hand():
    nan, inf = float("nan"), float("inf")
    window = Window([{"a/expert_load": [[1.0, nan], [3.0, 1.0]]}])
    window.add({"a/expert_load": [[2.0, nan], [inf, 2.0]]})
    # Elementwise mean of the finite values.
    np.testing.assert_array_equal(window.close()["a/expert_load"], [[1.5, nan], [3.0, 1.5]])


def test_experts_are_named(tmp_path):
    line = {
        "a-b/expert_load": [[0.5, 1.5], [1.0, None], [2.0, 0.0], [0.0, 2.0]],
        "a-b/layer_entropy": [0.1, 0.2, 0.3, 0.4],
        "a-b/sites": ["mlp/moe", "self_attn/q_proj"],
    }
    with contextlib.ExitStack() as opened:
        for writer in open_writers(tmp_path, LoggingConfig(tensorboard=True), {}, 0, opened):
            writer.write(10, line)
    written = {name: round(value, 5) for name, _, value in events(tmp_path / "tensorboard")}
    assert written == {
        "moe.a-b.experts.0/load/mlp/moe/0": 0.5,
        "moe.a-b.experts.1/load/mlp/moe/0": 1.5,
        "moe.a-b.experts.0/load/mlp/moe/1": 1.0,  # layer 1 has one expert
        "moe.a-b.experts.0/load/self_attn/q_proj/0": 2.0,
        "moe.a-b.experts.1/load/self_attn/q_proj/0": 0.0,
        "moe.a-b.experts.0/load/self_attn/q_proj/1": 0.0,
        "moe.a-b.experts.1/load/self_attn/q_proj/1": 2.0,
        "a-b/layer_entropy/mlp/moe/0": 0.1,
        "a-b/layer_entropy/mlp/moe/1": 0.2,
        "a-b/layer_entropy/self_attn/q_proj/0": 0.3,
        "a-b/layer_entropy/self_attn/q_proj/1": 0.4,
    }


LINES = [
    {"step": 4, "x/loss": 3.0, "validation/x/b/loss": 4.0, "validation/x/b/f1": 0.4},
    {"step": 6, "evaluation/x/arc_easy/acc": 0.125},
    {"step": 6, "evaluation/x/boolq/acc": 0.5, "evaluation/x/boolq/label_acc": 0.25},
    {"step": 8, "validation/x/a/loss": 2.0, "validation/x/b/loss": 1.0, "validation/x/b/f1": None},
    {"step": 8, "evaluation/xy/boolq/acc": 0.9},
    {"step": 9, "x/loss": None, "validation/xy/a/loss": 7.0, "validation/xy/a/f1": 0.7},
]


def test_last_values_by_hand():
    assert last_validation_metrics(LINES, "x", "b") == {"f1": None}
    assert last_validation_metrics(LINES[:3], "x", "b") == {"f1": 0.4}
    assert last_validation_metrics(LINES, "x", "a") == {}
    assert last_task_scores(LINES, "x") == (6, {"boolq": {"acc": 0.5, "label_acc": 0.25}})
    assert last_task_scores(LINES, "y") == (None, {})
    assert training_losses(LINES) == {"x": None}
    assert training_losses(LINES[:-1]) == {"x": 3.0}


def test_every_metric_of_a_step_is_in_the_table():
    method = {**tiny_program.MIXLORA, "router": {"name": "switch", "capacity": 4}}
    program = tiny_program.program({"a": method}, rows=2, compute={"dtype": "float16"})
    _, metrics = program.lower_train_step(8).out_info
    written = {name.removeprefix("a/") for name in metrics} - method["losses"].keys()
    for preference in ({"name": "dpo", "sft_weight": 1.0}, {"name": "kto"}):
        program = tiny_program.program(
            {"a": tiny_program.LORA}, rows=4, preferences={"a": preference}
        )
        _, metrics = program.lower_train_step(8).out_info
        written |= {name.removeprefix("a/") for name in metrics}
    # The recorder adds two. An entry of the table that no step writes fails too.
    assert written | {"learning_rate", "sites"} == METRICS.keys()


def events(folder):
    """Every (tag, step, value) in the event files, in order."""
    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # length, its checksum, the record, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            for value in event.summary.value:
                yield value.tag, event.step, value.simple_value
            at += 12 + size + 4


def test_tensorboard(tmp_path):
    config = LoggingConfig(tensorboard=True)
    require_writers(config)
    line = {"a/loss": 0.5, "a/grad_norm": None, "time": {"tokens_per_second": 8.0}}
    with contextlib.ExitStack() as opened:
        for writer in open_writers(tmp_path, config, {}, 0, opened):
            writer.write(10, line)
    written = list(events(tmp_path / "tensorboard"))
    assert written == [("a/loss", 10, 0.5), ("time/tokens_per_second", 10, 8.0)]


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    calls = []

    class FakeRun:
        def __init__(self, **settings):
            calls.append(settings)
            self.id = settings["id"] or "new-id"

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=FakeRun))
    config = LoggingConfig(wandb_project="project")
    require_writers(config)
    for step in (0, 10):
        with contextlib.ExitStack() as opened:
            settings = {"training": {"seed": 1}}
            for writer in open_writers(tmp_path, config, settings, step, opened):
                writer.write(step + 1, {"a/loss": 0.5, "time": {"x": 1.0}})
    first, second = calls[0], calls[3]
    assert (first["id"], second["id"]) == (None, "new-id")
    assert first["project"] == "project"
    assert first["config"] == {"training": {"seed": 1}}
    assert calls[4] == (11, {"a/loss": 0.5, "time/x": 1.0})


def test_wandb_that_does_not_start(tmp_path, monkeypatch):
    def refuse(**settings):
        raise OSError("no API key configured\nsee the manual")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with contextlib.ExitStack() as opened, pytest.raises(ConfigError) as error:
        open_writers(tmp_path, LoggingConfig(wandb_project="p"), {}, -1, opened)
    assert str(error.value).startswith("config.logging.wandb_project: W&B does not start (no API")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoggingConfig(tensorboard=True), "tensorboard"),
        (LoggingConfig(wandb_project="p"), "wandb_id"),
    ],
)
def test_writers_that_cannot_write(tmp_path, monkeypatch, config, name):
    run = types.SimpleNamespace(id="1", finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    if name == "tensorboard":
        (tmp_path / name).write_text("no folder")
    else:
        (tmp_path / name).mkdir()
    with (
        contextlib.ExitStack() as opened,
        pytest.raises(CheckpointError, match=f"cannot write .*{name}: "),
    ):
        open_writers(tmp_path, config, {}, -1, opened)


@pytest.mark.parametrize(
    ("config", "module", "words"),
    [
        (
            LoggingConfig(wandb_project="p"),
            "wandb",
            "config.logging.wandb_project: needs the package wandb, which is not installed",
        ),
        (LoggingConfig(tensorboard=True), "tensorboardX", "pip install -e '.[tensorboard]'"),
    ],
)
def test_a_writer_that_is_not_installed(monkeypatch, config, module, words):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as error:
        require_writers(config)
    assert words in str(error.value)
