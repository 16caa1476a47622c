"""Runs that start from a saved adapter: initial loss, exact resume, and early refusals."""

import dataclasses
import json
import shutil

import pytest
from foreign_adapters import random_adapter
from tiny_run import Run, final_adapter, metric_lines, read_config, write_inputs

import moe_jax
from moe_jax import surgery
from moe_jax.checkpoints.adapter_files import save_adapter
from moe_jax.checkpoints.training_record import read_record
from moe_jax.demo.tiny_llama import write_checkpoint
from moe_jax.training.run.inputs import read_inputs
from moe_jax.training.run.loop import train

LORA = "adapters__lora__"
UP = "adapters__up__"

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 300,
}

CONFIG = """

_base_config = get_config


def get_config():
    config = _base_config()
    up = config["adapters"].pop("default")
    up["method"]["num_experts"] = 3
    up["method"]["losses"] = {}
    lora = adapter("train", name="lora")
    fresh = adapter("train", name="lora")
    for settings in (up, lora, fresh):
        settings["method"]["target_modules"] = ("q_proj", "up_proj")  # less to compile
        settings["data"]["buckets"] = ()
        settings["optimizer"]["schedule"] = dict(kind="constant")
    up["start_from"], lora["start_from"] = str(HERE / "up"), str(HERE / "trained")
    config["adapters"] = dict(lora=lora, up=up, fresh=fresh)
    config["training"].update(steps=6, eval_every=3, log_every=3)
    config["checkpoints"]["every"] = 3
    return config
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A configuration with a LoRA that continues, its upcycled MixLoRA, and a new LoRA."""
    config = write_inputs(tmp_path_factory.mktemp("inputs"))
    config.write_text(config.read_text() + CONFIG)
    base = moe_jax.load_base(config.parent / "base")
    method = read_config(config).adapters["lora"].method
    fields = {**dataclasses.asdict(method), "name": "lora"}
    lora = random_adapter(fields, base.config, spread=0.3)._replace(base=base.identity)
    save_adapter(config.parent / "trained", lora)
    surgery.upcycle(lora, num_experts=3, output=config.parent / "up")
    return config


def test_begins_at_its_loss_and_resumes_exactly(inputs, tmp_path):
    whole = Run(inputs, tmp_path / "whole")
    assert whole.join() == 0, whole.log.read_text()
    losses = [line for line in metric_lines(whole.workdir) if "validation/up/held_out/loss" in line]
    loss = lambda name: [line[f"validation/{name}/held_out/loss"] for line in losses]
    assert loss("up")[0] == pytest.approx(loss("lora")[0], rel=1e-5)
    assert abs(loss("fresh")[0] - loss("lora")[0]) > 1e-3
    assert loss("up")[-1] < loss("up")[0] - 0.01
    # The best loss of an adapter with `start_from` may be the initial one.
    best = json.loads((whole.workdir / "adapters.json").read_text())
    for line in best:
        first = line["adapter"] == "fresh"
        assert line["best_loss"] == pytest.approx(min(loss(line["adapter"])[first:]))

    half = Run(inputs, tmp_path / "half", overrides={"training__steps": 3})
    assert half.join() == 0, half.log.read_text()
    moved = shutil.move(inputs.parent / "up", tmp_path / "moved")  # not needed after the start
    resumed = Run(inputs, tmp_path / "half")
    status = resumed.join()
    shutil.move(moved, inputs.parent / "up")
    assert status == 0, resumed.log.read_text()
    starts = {
        "lora": str(inputs.parent / "trained"),
        "up": str(inputs.parent / "up"),
        "fresh": None,
    }
    for name, start in starts.items():
        assert read_record(tmp_path / "half" / "adapters" / name).start_from == start
        expected = final_adapter(whole.workdir, name)
        for path, leaf in final_adapter(tmp_path / "half", name).items():
            assert (leaf == expected[path]).all(), path


def test_damaged_weights_are_refused_before_anything_is_written(inputs, tmp_path):
    damaged = shutil.copytree(inputs.parent / "up", tmp_path / "damaged")
    for file in damaged.glob("weights/**/d/*"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    config = read_config(inputs, **{UP + "start_from": str(damaged)})
    with pytest.raises(moe_jax.UserError, match=rf"^config\.adapters\.up\.start_from: .*{damaged}"):
        train(config, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({UP + "start_from": "nowhere"}, "nowhere: no adapter here, adapter.json"),
        ({UP + "method__rank": 8}, "up has method.rank 4, and the configuration 8; give the"),
        ({UP + "method__router__top_k": 1}, "up has method.router.top_k 2, and the configurat"),
        ({LORA + "method__name": "loramoe", LORA + "method__num_experts": 2}, "has method.name 'l"),
        ({"base__path": "OTHER"}, "trained: was trained on the base .* differ from it; give"),
    ],
)
def test_refused_before_the_data_is_read(inputs, tmp_path, overrides, words):
    if "base__path" in overrides:
        write_checkpoint(tmp_path / "base", **{**BASE, "seed": 1})
        overrides = {"base__path": str(tmp_path / "base")}
    missing = {f"{prefix}data__train__words__path": "no_data.jsonl" for prefix in (LORA, UP)}
    with pytest.raises(moe_jax.UserError, match=rf"^config\.adapters\.\w+\.start_from: .*{words}"):
        read_inputs(read_config(inputs, **missing, **overrides), lambda line: None)


def test_training_settings_may_differ(inputs):
    """Dropout, losses and jitter are accepted; the run fails later, on missing data."""
    changes = {
        UP + "method__dropout": 0.3,
        UP + "method__losses__router_z__coefficient": 0.1,
        UP + "method__router__jitter_noise": 0.2,
        LORA + "data__train__words__path": "no_data.jsonl",
    }
    with pytest.raises(moe_jax.UserError, match=r"no_data\.jsonl"):
        read_inputs(read_config(inputs, **changes), lambda line: None)
