"""lm-evaluation-harness gives the same results for `HarnessModel` as for transformers."""

import importlib
import json
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
from moe_jax.evaluation.lm_harness import HarnessModel, group_by_config
from moe_jax.inference.text_generator import Answer

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
    """`HarnessModel` and the model of transformers with the same weights."""
    adapter = None if request.param == "base" else setting.adapter
    reference = setting.reference if adapter is None else setting.reference_adapted
    ours = HarnessModel(setting.base, adapter, batch_size=5)
    return ours, HFLM(pretrained=reference, tokenizer=setting.tokenizer, batch_size=1)


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
        actual, expected = (np.array(s["filtered_resps"], float) for s in (one, two))
        # Up to a dozen tokens' logits are in one sum.
        np.testing.assert_allclose(actual[:, 0], expected[:, 0], rtol=0, atol=12 * FLOAT32_LOGITS)
        np.testing.assert_array_equal(actual[:, 1], expected[:, 1])


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


def test_greedy_continuations_are_recognized(models, setting):
    ours, theirs = models
    ids = setting.tokenizer("Question: Who?").input_ids
    with torch.no_grad():
        likeliest = int(theirs.model(torch.tensor([ids])).logits[0, -1].argmax())
    pairs = [
        (("", ""), ids, [likeliest]),
        (("", ""), ids, [(likeliest + 1) % 400]),
    ]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(pairs)] == [True, False]


def test_text_longer_than_the_context(models, setting):
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
    (actual,) = ours.loglikelihood_rolling(requests((text,)))
    np.testing.assert_allclose(actual / len(ids), expected / len(ids), rtol=0, atol=FLOAT32_LOGITS)


def test_rejected_requests(models):
    ours, _ = models
    long = "very " * 600
    with pytest.raises(UserError, match="longer than the base's context of 512"):
        ours.loglikelihood(requests((long, "b")))


GENERATING = """
task: local_words
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs:
  until: {until}
  max_gen_toks: 12
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""


def generated(model, folder, until):
    data = write_rows(folder / "rows.jsonl", ROWS)
    (folder / "words.yaml").write_text(GENERATING.format(data=data, until=json.dumps(until)))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model=model, tasks=["local_words"], task_manager=manager, bootstrap_iters=0
    )
    return [sample["resps"][0][0] for sample in results["samples"]["local_words"]]


def test_a_local_task_that_generates(models, tmp_path):
    ours, theirs = models
    whole = generated(theirs, tmp_path, ["never said"])
    assert generated(ours, tmp_path, ["never said"]) == whole
    # A stop string that begins inside a token and ends in another one.
    stops = sorted({text[4:8] for text in whole})
    cut = generated(theirs, tmp_path, stops)
    assert generated(ours, tmp_path, stops) == cut
    assert all(len(short) < len(long) for short, long in zip(cut, whole, strict=True))


class Echo:
    """A text generator whose answers say what was asked for; the last prompt is answered first."""

    def answers(self, prompts, config, batch_size):
        assert batch_size == 5
        for place, prompt in reversed([*enumerate(prompts)]):
            text = f"{len(prompt.tokens)} {config.max_new_tokens} {config.sampling.temperature}"
            yield [Answer(place, 0, text, 1, "stop")]


def test_generation_with_several_configs_at_once(models, monkeypatch):
    ours, _ = models
    monkeypatch.setattr(ours._session, "text_generator", lambda **_: Echo())
    ways = [
        {"until": ["zzz"], "max_gen_toks": 4},
        {"until": "zzz", "max_new_tokens": 9, "do_sample": True, "temperature": 1.5, "top_k": 0},
        {"until": ["zzz", ""], "max_tokens": 4, "do_sample": False, "temperature": 0.7},
        {"do_sample": True},
    ]
    arguments = [("a", ways[0]), ("a", ways[1]), ("a" * 40, ways[2]), ("a", ways[3]), ("", ways[1])]
    a, many = (len(ours.tok_encode(text)) for text in ("a", "a" * 40))
    assert ours.generate_until(requests(*arguments), disable_tqdm=True) == [
        f"{a} 4 0.0",
        f"{a} 9 1.5",
        f"{many} 4 0.0",
        f"{a} 256 1.0",
        "1 9 1.5",  # nothing but the token that texts begin with
    ]
    # The first and the third are asked for in the same way, so they share batches.
    assert list(group_by_config(arguments).values()) == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, r"generation_kwargs.num_beams: unknown; known: "),
        ({"max_gen_toks": 0}, "generation_kwargs.max_new_tokens: must be a positive number"),
        ({"do_sample": True, "top_p": 2}, "generation_kwargs.top_p: must be above 0"),
        ({"max_gen_toks": 600}, "a request of .* 600 new tokens exceed the base's context"),
    ],
)
def test_rejected_generation_requests(models, arguments, message):
    ours, _ = models
    with pytest.raises(UserError, match=message):
        ours.generate_until(requests(("a", arguments)), disable_tqdm=True)


def test_long_prompt_is_cut_at_its_start(setting):
    model = HarnessModel(setting.base, batch_size=1, truncate=True)
    long = "very " * 600
    tokens = model._prompt(long, 500).tokens
    whole = setting.tokenizer(long).input_ids
    assert list(tokens) == [whole[0], *whole[-11:]]


def test_a_chat_template_is_applied(setting):
    model = HarnessModel(setting.base, batch_size=1)
    history = [{"role": "user", "content": "Where?"}]
    text = model.apply_chat_template(history)
    assert text == "<s>user: Where?\nassistant: "
    expected = setting.tokenizer.apply_chat_template(history, add_generation_prompt=True)
    assert model.tok_encode(text) == list(expected["input_ids"])


def test_only_conversations_end_at_the_end_of_a_turn(models, monkeypatch):
    ours, _ = models
    chat_flags = []

    def text_generator(*, is_chat, decode_without_prompt):
        assert decode_without_prompt
        chat_flags.append(is_chat)
        return Echo()

    monkeypatch.setattr(ours._session, "text_generator", text_generator)
    way = {"until": ["zzz"], "max_gen_toks": 4}
    chat = ours.apply_chat_template([{"role": "user", "content": "Where?"}])
    both = ours.generate_until(requests(("a", way), (chat, way), ("b", way)), disable_tqdm=True)
    assert chat_flags == [False, True]
    lengths = [len(ours.tok_encode(text)) for text in ("a", chat, "b")]
    assert both == [f"{length} 4 0.0" for length in lengths]
    # The harness rebuilds all requests, also for a task without a template.
    ours.generate_until(requests(("Where?", way)), disable_tqdm=True)
    assert chat_flags == [False, True, False]


def test_long_request_is_cut_at_its_start(setting):
    model = HarnessModel(setting.base, batch_size=1, truncate=True)
    reference = HFLM(pretrained=setting.reference, tokenizer=setting.tokenizer, batch_size=1)
    (one,) = model.loglikelihood(requests(("very " * 600, " long")))
    ids = setting.tokenizer("very " * 600 + " long").input_ids
    assert len(ids) > 513
    kept = ids[:1] + ids[-512:]  # 512 are read, and the last is only predicted
    with torch.no_grad():
        logits = reference.model(torch.tensor([kept[:-1]])).logits[0]
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
