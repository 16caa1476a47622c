"""Errors and warnings about the inputs of a run, before its weights are read."""

import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_run import read_config, write_inputs
from transformers import PreTrainedTokenizerFast

from moe_jax.data import token_table
from moe_jax.errors import CheckpointError, ConfigError, DataError
from moe_jax.training.run.inputs import read_inputs

DATA = "adapters__default__data"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def refusal(config: Path, error: type[Exception] = ConfigError, /, **overrides: Any) -> str:
    with pytest.raises(error) as caught:
        read_inputs(read_config(config, **overrides), lambda _: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("train__words__path", "gone.jsonl", "train.words: gone.jsonl: no such file or folder"),
        ("validation__held_out__path", "./gone", "validation.held_out: ./gone: no such file"),
        ("train__words__columns__prompt", "text", "train.words: {}/train.jsonl: line 1: no column"),
    ],
)
def test_data_errors_name_the_field(inputs, field, value, words):
    error = refusal(inputs, DataError, **{f"{DATA}__{field}": value})
    assert error.startswith("config.adapters.default.data." + words.format(inputs.parent))


def test_a_data_set_may_be_given_by_its_path_alone(inputs):
    printed: list[str] = []
    given = read_inputs(read_config(inputs), lambda _: None)
    chosen = read_inputs(
        read_config(inputs, **{f"{DATA}__train__words__schema": None}), printed.append
    )
    assert chosen.data_fingerprint("default") == given.data_fingerprint("default")
    assert chosen.train["default"].source_schemas == {"words": "completion"}
    lines = "\n".join(printed).splitlines()
    assert any(line.startswith("words: ") and "(schema 'completion', by" in line for line in lines)
    assert not any(line.startswith("held_out: ") and "schema" in line for line in lines)


def test_settings_are_checked_before_data_is_read(inputs):
    gone = {f"{DATA}__train__words__path": "gone.jsonl"}
    rows = {"mesh__data": 8, "adapters__default__batch_size": 4}
    assert refusal(inputs, **rows, **gone).startswith("config.adapters.default.batch_size: ")
    # The base has two layers.
    text = inputs.read_text()
    mola = text.replace('name="mixlora",', 'name="mola",').replace("experts=4", "experts=(2, 3, 4)")
    config = inputs.with_name("mola.py")
    config.write_text(mola)
    error = refusal(config, **gone)
    assert error.startswith("config.adapters.default.method.num_experts: the model's 2 layers")


def test_an_unknown_prompt_template_names_the_field(inputs):
    schema = {f"{DATA}__train__words__schema": "instruction"}
    error = refusal(inputs, DataError, **schema, **{f"{DATA}__train__words__prompt": "instructon"})
    assert error.startswith(
        "config.adapters.default.data.train.words: prompt 'instructon': no such"
    )


def test_a_missing_base_names_the_field(inputs):
    error = refusal(inputs, CheckpointError, base__path="a/b/c")
    assert error == (
        "config.base.path: a/b/c: no such folder; give a folder, or a hub id owner/name"
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_token_without_an_embedding(tmp_path, split):
    config = write_inputs(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens([f"<spare {i}>" for i in range(300 - len(tokenizer))])
    tokenizer.add_tokens(["<thought>"])
    tokenizer.save_pretrained(tmp_path / "base")
    file, source = {"train": ("train", "words"), "validation": ("held_out", "held_out")}[split]
    read_inputs(read_config(config), lambda _: None)  # valid while no row has the token
    with (tmp_path / f"{file}.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "the <thought>", "completion": " fox"}) + "\n")
    error = refusal(config, DataError)
    assert error.startswith(f"config.adapters.default.data.{split}.{source}: ")
    assert "<thought>', id 300, but the base has embeddings for 300" in error
    assert "give a base whose embeddings cover its tokenizer" in error


@pytest.mark.parametrize(
    ("rope", "is_warned"),
    [
        ({"rope_type": "default"}, True),
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
    ],
)
def test_rows_longer_than_those_of_pretraining(tmp_path, rope, is_warned):
    config = write_inputs(tmp_path)
    file = tmp_path / "base" / "config.json"
    content = json.loads(file.read_text())
    rope = {"rope_theta": 10000.0, **rope}
    file.write_text(json.dumps({**content, "max_position_embeddings": 20, "rope_parameters": rope}))
    printed = []
    read_inputs(read_config(config), printed.append)
    warning = (
        "warning: config.adapters.default.data.max_length: rows of up to 24 tokens, but the base "
        "was trained on 20 positions"
    )
    assert (warning in printed) == is_warned
    printed.clear()
    read_inputs(read_config(config, **{f"{DATA}__max_length": 20}), printed.append)
    assert not any("warning" in line for line in printed)


def test_positions_of_packed_rows_count_within_a_sequence(tmp_path):
    config = write_inputs(tmp_path)
    file = tmp_path / "base" / "config.json"
    content = json.loads(file.read_text())
    packed = {f"{DATA}__packing": "first_fit", f"{DATA}__max_length": 200}
    for positions, is_warned in ((150, False), (10, True)):
        file.write_text(json.dumps({**content, "max_position_embeddings": positions}))
        printed: list[str] = []
        read_inputs(read_config(config, **packed), printed.append)
        assert any(f"was trained on {positions} positions" in line for line in printed) == is_warned
        assert any("to a row of 200 tokens" in line for line in printed)


def test_an_epoch_of_packed_rows_is_one_pass_over_the_data(inputs):
    epochs = {"training__steps": None, f"{DATA}__packing": "first_fit", f"{DATA}__max_length": 48}
    steps, seen = {}, []
    for count in (1, 2.5):
        run_inputs = read_inputs(
            read_config(inputs, training__epochs=count, **epochs), lambda _: None
        )
        steps[count] = run_inputs.steps["default"]
    for _ in range(steps[1]):
        batch = next(run_inputs.train["default"].iterator)
        begins = (batch.segment_ids > 0) & (batch.positions == 0)
        seen.append(int(begins.sum()))
    # 100 rows in batches of 8 are thirteen steps. Packed, the last step also has rows of the next
    # epoch.
    assert steps[1] < 8
    assert sum(seen) >= 100 > sum(seen[:-1])
    assert 2 * steps[1] <= steps[2.5] <= math.ceil(2.5 * steps[1])


def test_rows_padded_to_packed_rows_of_another_adapter(inputs):
    config = inputs.with_name("beside.py")
    beside = 'adapters=dict(other=adapter("other", name="lora"), '
    config.write_text(inputs.read_text().replace("adapters=dict(", beside))
    printed: list[str] = []
    packed = {f"{DATA}__packing": "first_fit", f"{DATA}__max_length": 48}
    read_inputs(read_config(config, **packed), printed.append)
    (warning,) = (line for line in printed if line.startswith("warning"))
    assert warning.startswith("warning: config.adapters.other.data.packing: all rows of a step")
    assert "padded to the 48 tokens of 'default'" in warning
    # Rows of a single padded length of 48 are not padded further.
    printed.clear()
    other = "adapters__other__data"
    same = {f"{other}__buckets": (), f"{other}__max_length": 48}
    read_inputs(read_config(config, **packed, **same), printed.append)
    assert not [line for line in printed if line.startswith("warning")]


def test_a_warmup_longer_than_training(inputs):
    steps = "adapters__default__optimizer__schedule__warmup_steps"
    error = refusal(inputs, training__steps=5, **{steps: 5})
    assert error.startswith("config.adapters.default.optimizer.schedule.warmup_steps: 5 steps of")
    assert "trains for 5" in error
    read_inputs(read_config(inputs, training__steps=5, **{steps: 4}), lambda _: None)
    in_epochs = {"training__steps": None, "training__epochs": 1}  # 100 rows in batches of 8
    assert "trains for 13; give fewer" in refusal(inputs, **in_epochs, **{steps: 13})


def test_worker_processes_are_not_forked_from_the_process_of_jax(inputs, tmp_path, monkeypatch):
    assert jax.device_count() == 8, "JAX has started its threads"
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked beside the threads of JAX"))
    fingerprints = []
    for workers in (0, 2):
        fields = {
            f"{DATA}__num_workers": workers,
            f"{DATA}__cache_dir": str(tmp_path / str(workers)),
        }
        run_inputs = read_inputs(read_config(inputs, **fields), lambda _: None)
        fingerprints.append(run_inputs.data_fingerprint("default"))
    assert fingerprints[0] == fingerprints[1]

    gone = {f"{DATA}__train__words__path": "gone.jsonl", f"{DATA}__num_workers": 2}
    error = refusal(inputs, DataError, **gone)
    assert error.startswith("config.adapters.default.data.train.words: gone.jsonl: no such file")


def test_worker_processes_fill_the_cache(inputs, tmp_path, monkeypatch):
    """The process of JAX reads what the workers have tokenized."""

    def fail(*arguments):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(token_table, "encode_examples", fail)
    fields = {f"{DATA}__num_workers": 2, f"{DATA}__cache_dir": str(tmp_path)}
    read_inputs(read_config(inputs, **fields), lambda _: None)
