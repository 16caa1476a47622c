"""Files of runs and evaluations: configuration, answers, results, training states."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fuzz.inputs import attempt, damaged, folder_with, fuzz, json_texts
from fuzz.test_configuration import RAW
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.adapters import METHODS
from moe_jax.checkpoints.store import TrainingStore
from moe_jax.config.evaluation import EvaluationConfig
from moe_jax.config.run import parse_run_config, to_json
from moe_jax.evaluation.answer_journal import Journal
from moe_jax.evaluation.evaluation_results import require_nothing_lost
from moe_jax.evaluation.training_evaluator import TrainingTaskEvaluation
from moe_jax.loaded.run_adapters import read_run_config
from moe_jax.training.run.workdir import WorkDir, require_same_run

CONFIG = parse_run_config(RAW, METHODS)
EVALUATED = dataclasses.replace(
    CONFIG,
    adapters={
        name: dataclasses.replace(adapter, evaluation=EvaluationConfig(tasks=("arc_easy",)))
        for name, adapter in CONFIG.adapters.items()
    },
)
SETTINGS = json.loads(to_json(CONFIG))
RESULTS = {
    "models": [{"name": "base", "adapter": None, "step": None}, {"name": "a", "adapter": "a"}],
    "tasks": [{"name": "arc_easy"}],
    "evaluation": {"a": {}},
}
IDENTITY = {"base": "b" * 64, "adapter": "a", "items": "i", "dtype": "float32"}


@fuzz(quick=60, share=0.05)
@given(json_texts(SETTINGS))
def test_settings(tmp_path_factory: pytest.TempPathFactory, text: bytes):
    folder = folder_with(tmp_path_factory, "config.json", text)
    with attempt("config.json of a run"):
        former = WorkDir(folder).former_settings()
        assert former is not None
        require_same_run(former, CONFIG, SETTINGS, folder)
    with attempt("config.json of a run, read alone"):
        read_run_config(folder)


@fuzz(quick=40, share=0.03)
@given(json_texts(RESULTS))
def test_results(tmp_path_factory: pytest.TempPathFactory, text: bytes):
    folder = folder_with(tmp_path_factory, "results.json", text)
    with attempt("results.json"):
        steps = dict.fromkeys(EVALUATED.adapters, 1)
        assert not TrainingTaskEvaluation().is_done(EVALUATED, steps, folder)
        require_nothing_lost(folder, ["arc_easy"], ["base", "a"])


def _journal(folder: Path) -> bytes:
    journal = Journal(folder / "a.jsonl", IDENTITY, 3)
    journal.add({"question": number, "answer": 1, "picked": {"x": 0}} for number in range(3))
    return (folder / "a.jsonl").read_bytes()


@fuzz(quick=40, share=0.03)
@given(data=st.data())
def test_answers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("journal")
    lines = _journal(folder).splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    line = json_texts(json.loads(lines[number])).map(lambda text: text.replace(b"\n", b" "))
    lines[number] = data.draw(line | damaged(lines[number]))
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    with attempt("answers of an evaluation"):
        Journal(folder / "a.jsonl", IDENTITY, 3)
    shutil.rmtree(folder)


ADAPTERS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
OPTIMIZER = {"step": jnp.int32(7)}
METADATA = {"steps": {"a": 9}, "data": {"a": {"train/x": "d"}}, "window": [{"loss": 0.5}]}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states") / "states"
    with TrainingStore(folder, every=1, keep=2) as store:
        store.save(
            3,
            adapters=ADAPTERS,
            optimizer=OPTIMIZER,
            data={"a": {"next_index": 3}},
            metadata=METADATA,
        )
    return folder


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@fuzz(quick=8, share=0.004)
@given(data=st.data())
def test_states(states: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("fuzz_states") / "states"
    shutil.copytree(states, folder)
    file = data.draw(st.sampled_from(sorted(f for f in folder.rglob("*") if f.is_file())))
    file.write_bytes(data.draw(damaged(file.read_bytes())))

    with attempt("training states"):
        with TrainingStore(folder, every=1, keep=2) as store:
            assert store.latest == 3
            restored = store.restore(3, _abstract(ADAPTERS), _abstract(OPTIMIZER))

        jax.tree.map(np.testing.assert_array_equal, restored.adapters, ADAPTERS)
    shutil.rmtree(folder.parent)
