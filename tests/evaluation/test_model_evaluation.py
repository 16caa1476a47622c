"""`evaluate`: resumption, sharding, truncation and errors."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from evaluation.conftest import METHOD, evaluate_with, write_rows
from hf_models import save_tiny_llama
from tolerances import FLOAT32_LOGITS, ROUNDING
from xla_flags import xla_flags

import moe_jax
from moe_jax.adapters.routing import SwitchRouter
from moe_jax.config.run import MeshConfig
from moe_jax.demo.tiny_llama import save_tokenizer, train_tokenizer
from moe_jax.errors import UserError
from moe_jax.evaluation import model_evaluation
from moe_jax.evaluation.scorer import Scorer
from moe_jax.tasks.selection import named_task

ROW_LENGTH = 48
"""Of labels, five batches of two rows of 96 tokens; of choices one of 96 and three of 48."""

QUESTIONS = 12


@pytest.fixture(scope="module")
def arc(tmp_path_factory):
    """Folder with `arc_easy` questions of different lengths."""
    rows = [
        {
            "question": "Why? " + "Because. " * (index % 5),
            "choices": {"text": ["red", "a blue one", "x" * (1 + index)], "label": list("ABC")},
            "answerKey": "ABC"[index % 3],
        }
        for index in range(QUESTIONS)
    ]
    folder = tmp_path_factory.mktemp("arc")
    write_rows(folder / "arc_easy" / "test.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def whole(setting, arc, tmp_path_factory):
    """An uninterrupted evaluation, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return _evaluate(setting, arc, folder), folder


def _evaluate(setting, arc, output, **fields):
    fields = {"batch_size": 2, "row_length": ROW_LENGTH, **fields}
    return evaluate_with(setting.base, ["arc_easy"], data=arc, output=output, **fields)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def _count_batches(monkeypatch, stop_after=None):
    """Counts computed batches, and interrupts the evaluation after `stop_after`."""
    start, counted = Scorer._start, []

    def counting(self, *arguments):
        if stop_after is not None and len(counted) == stop_after:
            raise KeyboardInterrupt
        counted.append(arguments)
        return start(self, *arguments)

    monkeypatch.setattr(Scorer, "_start", counting)
    return counted


def test_resumed_evaluation_skips_answered_questions(setting, arc, whole, tmp_path, monkeypatch):
    # All batches of labels, and three of choices, of which two were not read yet.
    with monkeypatch.context() as patch:
        _count_batches(patch, stop_after=8)
        with pytest.raises(KeyboardInterrupt):
            _evaluate(setting, arc, tmp_path)
    labels, choices = (
        tmp_path / "predictions" / "base" / f"arc_easy.{protocol}.jsonl"
        for protocol in ("labels", "choices")
    )
    assert len(labels.read_text().splitlines()) == 1 + QUESTIONS
    assert len(choices.read_text().splitlines()) == 1 + 4
    with choices.open("a") as stream:
        stream.write('{"question": 11, "answer')  # as a kill leaves it

    with monkeypatch.context() as patch:
        counted = _count_batches(patch)
        _evaluate(setting, arc, tmp_path)
    assert len(counted) == 3
    assert _files(tmp_path) == _files(whole[1])

    with monkeypatch.context() as patch:
        counted = _count_batches(patch)
        patch.setattr(model_evaluation, "load_params", None)
        again = _evaluate(setting, arc, tmp_path)
    assert counted == []
    assert again.to_plain() == whole[0].to_plain()


def _hang_after(base, data, output, batches):
    start, done = Scorer._start, []

    def hanging(self, *arguments):
        if len(done) == batches:
            time.sleep(600)
        done.append(None)
        return start(self, *arguments)

    Scorer._start = hanging
    os.environ["XLA_FLAGS"] = xla_flags(devices=1)
    evaluate_with(base, ["arc_easy"], data=data, output=output, batch_size=2, row_length=ROW_LENGTH)


def test_results_are_unchanged_after_a_kill(setting, arc, whole, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moe_jax.evaluation.model_evaluation"])
    process = context.Process(target=_hang_after, args=(setting.base, arc, tmp_path, 6))
    process.start()
    journal = tmp_path / "predictions" / "base" / "arc_easy.labels.jsonl"
    deadline = time.monotonic() + 600
    while not journal.exists() or len(journal.read_text().splitlines()) < 1 + 8:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "results.json").exists()
    _evaluate(setting, arc, tmp_path)
    assert _files(tmp_path) == _files(whole[1])


def test_journals_of_other_evaluations_are_rejected(setting, arc, whole, tmp_path):
    _, folder = whole
    before = _files(folder)
    with pytest.raises(UserError, match=r"arc_easy.labels.jsonl: .* other questions .*delete"):
        _evaluate(setting, arc, folder, limit=3)
    with pytest.raises(UserError, match="with another dtype;"):
        _evaluate(setting, arc, folder, dtype="bfloat16")
    for seed in (1, 2):
        loaded = moe_jax.load_base(setting.base)
        model = moe_jax.AdaptedModel(loaded, {"a": METHOD}, seed=seed)
        model.save("a", tmp_path / f"adapter{seed}")
    one = {"protocols": ["labels"], "limit": 2}
    _evaluate(setting, arc, tmp_path / "out", adapters={"a": tmp_path / "adapter1"}, **one)
    with pytest.raises(UserError, match="with another adapter;"):
        _evaluate(setting, arc, tmp_path / "out", adapters={"a": tmp_path / "adapter2"}, **one)
    journal = tmp_path / "out" / "predictions" / "a" / "arc_easy.labels.jsonl"
    journal.write_text("nonsense\n")
    with pytest.raises(UserError, match=r"arc_easy.labels.jsonl: is damaged"):
        _evaluate(setting, arc, tmp_path / "out", adapters={"a": tmp_path / "adapter1"}, **one)
    assert _files(folder) == before


def test_scores_do_not_depend_on_batches_and_padding(setting, arc, whole, monkeypatch):
    scorers = []
    init = Scorer.__init__

    def remembering(self, *arguments, **fields):
        init(self, *arguments, **fields)
        scorers.append(self)

    monkeypatch.setattr(Scorer, "__init__", remembering)
    other = _evaluate(setting, arc, None, batch_size=5, row_length=64)
    for one, two in zip(whole[0].outcomes, other.outcomes, strict=True):
        _assert_same_answers(one, two)
    (scorer,) = scorers
    assert scorer.compilations() == 2  # rows of 128 and 64 tokens, for both protocols


def test_scores_do_not_depend_on_the_mesh(setting, arc, whole):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    adapters = {"tuned": setting.adapter}
    fields = {"adapters": adapters, "protocols": ["choices"]}
    alone = _evaluate(setting, arc, None, batch_size=8, **fields)
    spread = _evaluate(setting, arc, None, batch_size=6, mesh=mesh, **fields)
    _assert_same_answers(alone.outcomes[0], spread.outcomes[0])
    assert alone.outcomes[0].examples[0]["scores"] != whole[0].outcomes[1].examples[0]["scores"]


def _assert_same_answers(one, two):
    for left, right in zip(one.examples, two.examples, strict=True):
        np.testing.assert_allclose(left["scores"], right["scores"], **ROUNDING)
        assert {**left, "scores": None} == {**right, "scores": None}


def test_padding_takes_no_expert_capacity(setting, arc, tmp_path):
    """Experts with a capacity: padded batches against single questions."""
    base = moe_jax.load_base(setting.base)
    router = SwitchRouter(capacity_factor=1.0, init_std=1.0)
    method = moe_jax.MixLoraConfig(
        rank=4, alpha=8.0, target_modules=("up_proj",), num_experts=4, router=router
    )
    model = moe_jax.AdaptedModel(base, {"routed": method})
    model.adapters["routed"] = jax.tree.map(lambda leaf: leaf + 0.1, model.adapters["routed"])
    model.save("routed", tmp_path / "routed")
    fields = {"data": arc, "protocols": "labels", "limit": 3, "batch_size": 4}
    evaluation = evaluate_with(base, "arc_easy", {"routed": tmp_path / "routed"}, **fields)
    letters = [setting.tokenizer(f"Answer: {letter}").input_ids[-1] for letter in "ABC"]
    questions = named_task("arc_easy", data=arc, limit=3).questions()
    for question, record in zip(questions, evaluation.outcomes[0].examples, strict=True):
        ids = setting.tokenizer(question.preface + question.prompt).input_ids
        expected = jax.nn.log_softmax(model([ids], "routed")[0, -1])[np.array(letters)]
        np.testing.assert_allclose(record["scores"], expected, **ROUNDING)
    base_evaluation = evaluate_with(base, "arc_easy", **fields)
    (first, *_), (second, *_) = (e.outcomes[0].examples for e in (base_evaluation, evaluation))
    assert first["scores"] != second["scores"]


def test_memory_and_folders_give_the_same_results(setting, arc, whole):
    base = moe_jax.load_base(setting.base)
    adapter = moe_jax.load_adapter(setting.adapter)
    fields = {"data": arc, "protocols": "labels", "batch_size": 2, "row_length": ROW_LENGTH}
    evaluation = evaluate_with(base, "arc_easy", {"tuned": adapter}, with_base=True, **fields)
    assert evaluation.models == ["base", "tuned"]
    assert evaluation.outcomes[0].examples == whole[0].outcomes[0].examples
    folders = evaluate_with(setting.base, "arc_easy", {"tuned": setting.adapter}, **fields)
    assert folders.models == ["tuned"]
    assert folders.outcomes[0].examples == evaluation.outcomes[1].examples


def test_truncation_at_the_start(setting, arc, tmp_path):
    tokenizer = setting.tokenizer
    # Its own context is shorter than some of the prompts.
    reference = save_tiny_llama(
        tmp_path, vocab_size=len(tokenizer), max_position_embeddings=64, num_hidden_layers=1
    )
    save_tokenizer(tokenizer, tmp_path)
    fields = {"data": arc, "protocols": ["labels"]}
    with pytest.raises(UserError, match=r"arc_easy.*test.jsonl: line \d+: \d+ tokens .* has 64;"):
        evaluate_with(tmp_path, ["arc_easy"], **fields)
    evaluation = evaluate_with(tmp_path, ["arc_easy"], truncate=True, **fields)
    letters = [tokenizer(f"Answer: {letter}").input_ids[-1] for letter in "ABC"]
    questions = named_task("arc_easy", data=arc).questions()
    cut = 0
    for question, record in zip(questions, evaluation.outcomes[0].examples, strict=True):
        ids = tokenizer(question.preface + question.prompt).input_ids
        cut += len(ids) > 64
        if len(ids) > 64:
            ids = ids[:1] + ids[-63:]
        with torch.no_grad():
            logits = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1], dim=-1)
        np.testing.assert_allclose(record["scores"], logits[letters], rtol=0, atol=FLOAT32_LOGITS)
    assert 0 < cut < QUESTIONS
    assert evaluation.to_plain()["tasks"][0]["cut"] == {"labels": cut}


@pytest.fixture
def no_weights(monkeypatch):
    """Fails if the weights of the base are read."""
    monkeypatch.setattr(model_evaluation, "load_params", None)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": ["arc_esy"]}, "task 'arc_esy': .* did you mean 'arc_easy'?"),
        ({"tasks": []}, "tasks: none is given"),
        ({"tasks": ["arc_easy", "arc_easy"]}, "task 'arc_easy': is given twice"),
        ({"tasks": ["boolq"]}, "boolq: no such folder for the task; known: arc_easy"),
        ({"split": "tset"}, r"arc_easy: .* the split 'tset'; known: test.jsonl"),
        ({"shots": 1}, "arc_easy: no file is named after the split 'train'"),
        ({"split": "train", "shots": 1}, "shots are taken from the split 'train'"),
        ({"shots": -1}, "shots: must not be negative, got -1"),
        ({"limit": 0}, "limit: must be positive, got 0"),
        ({"protocols": ["label"]}, "protocols: .* 'label'; did you mean 'labels'?"),
        ({"protocols": []}, "protocols: give each once"),
        ({"batch_size": 0}, "batch_size: must be positive"),
        ({"row_length": 0}, "row_length: must be positive"),
        ({"adapters": {"base": "x"}}, "adapter 'base': its name"),
        ({"adapters": {"a/b": "x"}}, "adapter 'a/b': its name"),
        ({"adapters": {"a": "x"}}, "x: no adapter here"),
        ({"data": None}, r"allenai/ai2_arc: the split 'test' .* local folder \(--data\)"),
    ],
)
def test_invalid_arguments(setting, arc, fields, message):
    fields = {"tasks": ["arc_easy"], "data": arc, **fields}
    with pytest.raises(UserError, match=message):
        evaluate_with(setting.base, **fields)


@pytest.mark.usefixtures("no_weights")
def test_mismatched_adapter_or_tokenizer_is_rejected(setting, arc, tmp_path):
    vocab = len(setting.tokenizer)
    save_tiny_llama(tmp_path / "other", seed=1, vocab_size=vocab, max_position_embeddings=512)
    save_tokenizer(setting.tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match=r"adapter 'tuned': was trained on the base .*base"):
        evaluate_with(tmp_path / "other", ["arc_easy"], {"tuned": setting.adapter}, data=arc)
    save_tiny_llama(tmp_path / "small", vocab_size=96)
    save_tokenizer(train_tokenizer(["a"], 258), tmp_path / "small")
    with pytest.raises(
        UserError,
        match=r"gives the id \d+ .*, but one of the models has .* 0 to 95 only; use the base's",
    ):
        evaluate_with(tmp_path / "small", ["arc_easy"], data=arc)


def test_non_finite_scores_are_rejected(setting, arc):
    base = moe_jax.load_base(setting.base)
    params = jax.tree.map(lambda leaf: leaf * np.float32(np.inf), base.params)
    broken = dataclasses.replace(base, params=params)
    with pytest.raises(UserError, match=r"test.jsonl: line \d+ are not finite"):
        evaluate_with(broken, ["arc_easy"], data=arc, protocols=["labels"])


def test_results_folder_is_locked(setting, arc, tmp_path):
    with (
        model_evaluation.locked(tmp_path),
        pytest.raises(UserError, match="another evaluation is writing"),
    ):
        _evaluate(setting, arc, tmp_path)


def test_saved_results(whole):
    evaluation, folder = whole
    saved = json.loads((folder / "results.json").read_text())
    assert saved == json.loads(json.dumps(evaluation.to_plain()))
    assert saved["tasks"][0]["questions"] == QUESTIONS
    assert (folder / "results.md").read_text() == evaluation.to_markdown()
    lines = (folder / "predictions" / "base" / "arc_easy.choices.jsonl").read_text().splitlines()
    examples = [json.loads(line) for line in lines[1:]]
    assert [example["question"] for example in examples] == list(range(QUESTIONS))
    correct = sum(example["picked"]["acc"] == example["answer"] for example in examples)
    assert saved["results"][1]["measures"]["acc"]["correct"] == correct


def test_results_of_other_models_and_tasks_are_not_overwritten(setting, arc, whole, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(whole[1], folder)
    before = _files(folder)
    adapters = {"tuned": setting.adapter}
    with pytest.raises(
        UserError, match=r"models that this evaluation leaves out.* base; include these too"
    ):
        _evaluate(setting, arc, folder, adapters=adapters)
    assert _files(folder) == before
    results = json.loads((folder / "results.json").read_text())
    results["tasks"].append({"name": "boolq"})
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"results.json: holds tasks .* boolq; include these too"):
        _evaluate(setting, arc, folder)
