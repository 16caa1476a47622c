"""A run with new tokens: what changes, exact resume, later use, and refusals."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import WORDS, final_adapter, read_config, write_inputs
from transformers import AutoTokenizer

import moe_jax
from moe_jax.training.run.inputs import read_inputs
from moe_jax.training.run.loop import train

TOKENS = ("<w>", "</w>")
METHOD = "adapters__default__method"
OVERRIDES = {
    f"{METHOD}__new_tokens": TOKENS,
    "adapters__default__optimizer__schedule__kind": "constant",
    "adapters__default__optimizer__learning_rate": 0.02,
    "adapters__default__data__buckets": "()",
    "training__steps": 30,
    "training__eval_every": 0,
    "checkpoints__every": 20,
}


def rows(count):
    pairs = [(WORDS[i % 12], WORDS[(i * 5 + 3) % 12]) for i in range(count)]
    return [{"prompt": f"{a} <w>{b}</w> ->", "completion": "<w></w>"} for a, b in pairs]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    config = write_inputs(tmp_path_factory.mktemp("inputs"))
    for name, count in (("train", 60), ("held_out", 12)):
        lines = "".join(json.dumps(row) + "\n" for row in rows(count))
        (config.parent / f"{name}.jsonl").write_text(lines)
    return config


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    before = load_file(inputs.parent / "base" / "model.safetensors")
    printed = []
    result = train(read_config(inputs, **OVERRIDES), workdir, printed.append)
    assert any("new_tokens (64)" in line for line in printed)
    after = load_file(inputs.parent / "base" / "model.safetensors")
    assert all((after[name] == tensor).all() for name, tensor in before.items())
    assert result.validation["default/held_out"] < 2.0  # log 300 = 5.7 is that of guessing
    return workdir


def test_the_new_rows_and_the_adapter_change(inputs, finished):
    saved = moe_jax.load_adapter(finished / "adapters" / "default")
    tokenizer = AutoTokenizer.from_pretrained(inputs.parent / "base")
    used = len(tokenizer)
    assert saved.method.new_tokens == TOKENS
    assert saved.method.new_token_id == used < saved.model.vocab_size, "the base is padded"
    leaves = final_adapter(finished)
    assert leaves["new_tokens/embedding"].shape == (2, 32)
    weights = load_file(inputs.parent / "base" / "model.safetensors")
    mean = weights["model.embed_tokens.weight"][:used].mean(axis=0)
    first, second = leaves["new_tokens/embedding"]
    for row, other in ((first, mean), (second, mean), (first, second)):
        assert np.abs(row - other).max() > 0.05
    assert all(leaf.any() for leaf in leaves.values()), "every leaf was trained"


def test_resume_is_exact(inputs, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "30")
    shutil.rmtree(workdir / "adapters")
    stopped = moe_jax.load_adapter(workdir)
    assert stopped.step == 20 and stopped.method.new_token_id is not None
    train(read_config(inputs, **OVERRIDES), workdir, lambda _: None)
    expected = final_adapter(finished)
    for path, leaf in final_adapter(workdir).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_generation_emits_new_tokens(inputs, finished):
    base = moe_jax.load_base(inputs.parent / "base")
    adapter = moe_jax.load_adapter(finished)
    model = moe_jax.AdaptedModel(base, {"x": adapter})
    prompts = [row["prompt"] for row in rows(4)]
    answers = moe_jax.generate(model, prompts, "x", max_new_tokens=6)
    assert all("<w>" in answer and "</w>" in answer for answer in answers)
    penalty = {"repetition_penalty": 1.01, "max_new_tokens": 6}  # of the new tokens too
    stopped = moe_jax.generate(model, prompts, "x", stop=("</w>",), **penalty)
    assert all("<w>" in answer and "</w>" not in answer for answer in stopped)
    # In one batch with the base, whose answers do not change.
    mixed = moe_jax.generate(model, prompts[:2], ["x", None], max_new_tokens=6)
    assert mixed == [answers[0], *moe_jax.generate(base, prompts[1:2], max_new_tokens=6)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_token_that_no_row_holds_is_named(inputs, streaming):
    fields = {
        **OVERRIDES,
        f"{METHOD}__new_tokens": ("<w>", "<v>", "</w>", "</v>"),
        "adapters__default__data__streaming": streaming,
    }
    said = []
    read_inputs(read_config(inputs, **fields), said.append)
    warnings = [line for line in said if line.startswith("warning")]
    if streaming:
        assert not warnings
        return
    (warning,) = warnings
    assert warning.startswith(
        "warning: config.adapters.default.method.new_tokens: no training row holds '<v>', '</v>', "
    )
    said.clear()
    read_inputs(read_config(inputs, **OVERRIDES), said.append)
    assert not any(line.startswith("warning") for line in said)


def test_start_from_requires_the_same_tokens(inputs, finished):
    start = {"adapters__default__start_from": finished / "adapters" / "default"}
    read_inputs(read_config(inputs, **OVERRIDES, **start), lambda _: None)
    other = {**OVERRIDES, **start, f"{METHOD}__new_tokens": ("<w>",)}
    with pytest.raises(moe_jax.UserError, match=r"start_from: .*has method\.new_tokens"):
        read_inputs(read_config(inputs, **other), lambda _: None)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (("<w>", "</s>"), r"method\.new_tokens: '</s>' is a token of the base's tokenizer already"),
        (("<w>", "<w>"), r"method\.new_tokens: names <w> more than once"),
        (("<w>", ""), r"method\.new_tokens: holds an empty text"),
    ],
)
def test_refused_tokens(inputs, tokens, words):
    given = {**OVERRIDES, f"{METHOD}__new_tokens": tokens}
    with pytest.raises(moe_jax.UserError, match=rf"config\.adapters\.default\.{words}"):
        read_inputs(read_config(inputs, **given), lambda _: None)


def test_adapters_of_a_run_have_the_same_tokens(inputs):
    config = read_config(inputs, **OVERRIDES)
    method = dataclasses.replace(config.adapters["default"].method, new_tokens=())
    other = dataclasses.replace(config.adapters["default"], method=method)
    with pytest.raises(moe_jax.UserError, match=r"all adapters of a run have the same tokens"):
        dataclasses.replace(config, adapters={**config.adapters, "other": other})
