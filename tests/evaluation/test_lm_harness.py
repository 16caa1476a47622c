"""lm-evaluation-harness runs its own tasks on our model as on transformers'."""

import importlib
import sys
from types import SimpleNamespace

import lm_eval
import numpy as np
import pytest
import torch
from evaluation.conftest import write_rows
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tolerances import FLOAT32_LOGITS

from moe_jax.errors import UserError
from moe_jax.evaluation.lm_harness import HarnessModel

TASK = """
task: local_quiz
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""

ROWS = [
    {"question": f"{what}?", "choices": ["red", "a blue one", "up and away"], "answer": index % 3}
    for index, what in enumerate(["Who", "Where is it", "Why", "How much", "When did they go"])
]


@pytest.fixture(scope="module", params=["base", "tuned"])
def models(request, setting):
    """Ours, and transformers' with the same weights."""
    adapter = None if request.param == "base" else setting.adapter
    plain = setting.plain if adapter is None else setting.plain_adapted
    ours = HarnessModel(setting.base, adapter, batch_size=4)
    return ours, HFLM(pretrained=plain, tokenizer=setting.tokenizer, batch_size=1)


def run(model, folder):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=["local_quiz"], task_manager=manager, bootstrap_iters=0
    )


def test_a_local_task(models, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "quiz.yaml").write_text(TASK.format(data=data))
    ours, theirs = (run(model, tmp_path) for model in models)
    assert ours["results"]["local_quiz"] == theirs["results"]["local_quiz"]
    for one, two in zip(*(r["samples"]["local_quiz"] for r in (ours, theirs)), strict=True):
        assert one["arguments"] == two["arguments"]
        said, expected = (np.array(s["filtered_resps"], float) for s in (one, two))
        # Up to a dozen tokens' logits are in one sum.
        np.testing.assert_allclose(said[:, 0], expected[:, 0], rtol=0, atol=12 * FLOAT32_LOGITS)
        np.testing.assert_array_equal(said[:, 1], expected[:, 1])


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def test_greedy_continuations_are_recognised(models, setting):
    ours, theirs = models
    ids = setting.tokenizer("Question: Who?").input_ids
    with torch.no_grad():
        likeliest = int(theirs.model(torch.tensor([ids])).logits[0, -1].argmax())
    pairs = [
        (("", ""), ids, [likeliest]),
        (("", ""), ids, [(likeliest + 1) % 400]),
    ]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(pairs)] == [True, False]


def test_a_text_longer_than_the_context(models, setting):
    """Windows of the whole context: every token is predicted once, from as many as there are."""
    ours, theirs = models
    text = "Where is a door? In a house, by the sea. " * 40
    ids = setting.tokenizer(text, add_special_tokens=False).input_ids
    context = ours.max_length
    assert context < len(ids) < 2 * context
    # The first 512 from <s> on; of the last 512 with the token before them, those that are left.
    first = [setting.tokenizer.bos_token_id, *ids[: context - 1]]
    last, left = ids[-context - 1 : -1], len(ids) - context
    with torch.no_grad():
        first, last = (
            torch.log_softmax(theirs.model(torch.tensor([window])).logits[0].double(), -1)
            for window in (first, last)
        )
    expected = sum(first[place, token] for place, token in enumerate(ids[:context]))
    expected += sum(last[place - left, token] for place, token in enumerate(ids[-left:]))
    (found,) = ours.loglikelihood_rolling(requests((text,)))
    np.testing.assert_allclose(found / len(ids), expected / len(ids), rtol=0, atol=FLOAT32_LOGITS)


def test_what_it_refuses(models):
    ours, _ = models
    with pytest.raises(UserError, match="this task generates text"):
        ours.generate_until(requests(("a", {})))
    long = "very " * 600
    with pytest.raises(UserError, match="longer than the base's context of 512"):
        ours.loglikelihood(requests((long, "b")))


def test_a_long_request_loses_its_start(setting):
    model = HarnessModel(setting.base, batch_size=1, truncate=True)
    plain = HFLM(pretrained=setting.plain, tokenizer=setting.tokenizer, batch_size=1)
    (one,) = model.loglikelihood(requests(("very " * 600, " long")))
    ids = setting.tokenizer("very " * 600 + " long").input_ids
    assert len(ids) > 513
    kept = ids[:1] + ids[-512:]  # 512 are read, and the last is only predicted
    with torch.no_grad():
        logits = plain.model(torch.tensor([kept[:-1]])).logits[0]
    log_probs = torch.log_softmax(logits.double(), -1)
    count = len(setting.tokenizer(" long", add_special_tokens=False).input_ids)
    expected = sum(log_probs[-place, kept[-place]] for place in range(1, count + 1))
    np.testing.assert_allclose(one[0], expected, rtol=0, atol=FLOAT32_LOGITS * count)


def test_without_the_extra_the_error_names_it(monkeypatch):
    name = "moe_jax.evaluation.lm_harness"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'moe-jax\[lm-eval\]'"):
        importlib.import_module(name)
