"""Sweep through the Python API: one run with an adapter for each combination, and their table."""

import json
import logging
import sys

import numpy as np
import pytest
from one_device import one_device
from tiny_run import final_adapter, metric_lines, write_inputs

import moe_jax
from moe_jax.config.command_line import load_config_file
from moe_jax.data import pipeline

SWEEP = """

def get_config():
    plain = adapter("train", name="lora")
    plain["method"] |= dict(target_modules=("q_proj",), dropout=0.0)
    plain["data"] |= dict(buckets=())
    plain["data"]["validation"]["other"] = source("other")
    return dict(
        base=dict(path=str(HERE / "base"), param_dtype="float32"),
        compute=dict(dtype="float32"),
        adapters=dict(default=plain),
        training=dict(steps=3, log_every=2),
        sweep=dict(grid={"optimizer.learning_rate": (1e-2, 0.1), "seed": (0, 1)}),
    )
"""
NAMES = [f"default-learning_rate={rate}-seed={seed}" for rate in (0.01, 0.1) for seed in (0, 1)]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The work directory, what `train` returned, tokenized data sets, and changed process hooks."""
    folder = tmp_path_factory.mktemp("sweep")
    config = write_inputs(folder)
    config.write_text(config.read_text() + SWEEP)
    tokenized = []
    tokenize = pipeline.tokenize_source

    def counted(name, *arguments):
        tokenized.append(name)
        return tokenize(name, *arguments)

    with one_device() as patch:
        patch.setattr(pipeline, "tokenize_source", counted)
        hooks = process_hooks()
        result = moe_jax.train(load_config_file(str(config)), folder / "run")
        changed = {name for name, hook in process_hooks().items() if hook != hooks[name]}
    return folder / "run", result, tokenized, changed


def process_hooks():
    loggers = ("absl", "asyncio", "jax", None)
    filters = {f"filters of {name}": [*logging.getLogger(name).filters] for name in loggers}
    return {"unraisable": sys.unraisablehook, "except": sys.excepthook, **filters}


def test_training_from_python_leaves_process_hooks_alone(swept):
    assert swept[3] == set()


def test_every_combination_is_trained(swept):
    workdir, result, *_ = swept
    assert sorted(path.name for path in (workdir / "adapters").iterdir()) == sorted(NAMES)
    assert list(result.adapters) == NAMES
    recorded = json.loads((workdir / "config.json").read_text())
    assert list(recorded["adapters"]) == NAMES and "sweep" not in recorded
    leaves = [final_adapter(workdir, name)["layers/self_attn/q_proj/lora_B"] for name in NAMES]
    for number, leaf in enumerate(leaves):
        assert leaf.any()
        assert all((leaf != other).any() for other in leaves[:number])


def test_equal_data_is_tokenized_once(swept):
    assert sorted(swept[2]) == ["held_out", "other", "words"]


def test_the_table_is_sorted_by_validation_loss(swept):
    workdir, result, *_ = swept
    table = json.loads((workdir / "adapters.json").read_text())
    lines = metric_lines(workdir)
    for row in table:
        name = row["adapter"]
        for each in ("held_out", "other"):
            (*_, last) = [
                v
                for line in lines
                for k, v in line.items()
                if k == f"validation/{name}/{each}/loss"
            ]
            assert row["validation"][each] == last
        assert row["validation_loss"] == pytest.approx(np.mean(list(row["validation"].values())))
        (*_, last) = [line[f"{name}/loss"] for line in lines if f"{name}/loss" in line]
        assert (row["training_loss"], row["steps"]) == (last, 3)
    losses = [row["validation_loss"] for row in table]
    assert losses == sorted(losses) and len(set(losses)) == 4
    assert [row["adapter"] for row in table] == list(result.reports)
    best = result.reports[table[0]["adapter"]]
    assert best.folder == result.adapters[best.name]
    assert best.validation_loss == losses[0]
    markdown = (workdir / "adapters.md").read_text().splitlines()
    assert [text.split(" ")[1] for text in markdown[2:]] == list(result.reports)
