"""Preference and feedback data: forms of rows, rows of a batch, what is left out, and refusals."""

import json

import numpy as np
import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.config.preference import DpoConfig, KtoConfig
from moe_jax.data.pipeline import load_train_data, load_validation_data
from moe_jax.errors import DataError

USER = {"role": "user", "content": "U"}
FIRST = [USER, {"role": "assistant", "content": "A1"}, {"role": "user", "content": "V"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))


@pytest.fixture
def load(write, data_config):
    """Training data of rows, a batch of all of its examples by default."""

    def load_rows(rows, tokenizer, preference=None, batch_size=None, columns=None, **fields):
        source = SourceConfig(path=write("rows.jsonl", rows), columns=columns or {})
        config = data_config(source, validation={"same": source}, **fields)
        preference = preference or DpoConfig()
        data = load_train_data(
            config, tokenizer, batch_size or 2 * len(rows), 0, preference=preference
        )
        validation = load_validation_data(config, tokenizer, 4, preference=preference)
        return data, validation["same"]

    return load_rows


def text_of(batch, tokenizer):
    """Prompt and answer of each row."""
    return [
        tuple(tokenizer.decode(tokens[real & (mask == part)]) for part in (False, True))
        for tokens, mask, real in zip(
            batch.tokens, batch.loss_mask, batch.segment_ids > 0, strict=True
        )
    ]


def one_pair(load, tokenizer, row, **fields):
    data, _ = load([row], tokenizer, **fields)
    return text_of(next(data.iterator), tokenizer)


def test_a_pair_is_two_rows_with_the_prompt_and_an_answer(load, word_tokenizer):
    row = {"prompt": "a b", "chosen": "c", "rejected": "d e"}
    assert one_pair(load, word_tokenizer, row) == [
        ("<s> a b", "c </s>"),
        ("<s> a b", "d e </s>"),
    ]


PROMPT = "<|start|>user\nU<|stop|>\n<|start|>assistant\n"
TALK = "<|start|>user\nU<|stop|>\n<|start|>assistant\nA1<|stop|>\n<|start|>user\nV<|stop|>\n"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PROMPT),
        ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, PROMPT),
        ({"prompt": "U", "chosen": [GOOD], "rejected": [BAD]}, PROMPT),
        # UltraFeedback: the prompt's text, and whole conversations.
        ({"prompt": "U", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PROMPT),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, PROMPT),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PROMPT),
        # An earlier answer is part of the prompt and no target.
        ({"chosen": [*FIRST, GOOD], "rejected": [*FIRST, BAD]}, f"{TALK}<|start|>assistant\n"),
        ({"prompt": FIRST, "chosen": [GOOD], "rejected": [BAD]}, f"{TALK}<|start|>assistant\n"),
        # Messages as JSON text.
        (
            {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": [BAD]},
            PROMPT,
        ),
        ({"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])}, PROMPT),
        # One message without a list; ShareGPT's pairs.
        ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, PROMPT),
        (
            {
                "conversations": [{"from": "human", "value": "U"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
            PROMPT,
        ),
    ],
)
def test_forms_of_messages(load, byte_tokenizer, row, prompt):
    expected = [(prompt, "good<|stop|>"), (prompt, "bad<|stop|>")]
    assert one_pair(load, byte_tokenizer, row) == expected


def test_texts_that_share_a_beginning(load, word_tokenizer):
    row = {"chosen": "a b c", "rejected": "a b d e"}
    assert one_pair(load, word_tokenizer, row) == [
        ("<s> a b", "c </s>"),
        ("<s> a b", "d e </s>"),
    ]


@pytest.mark.parametrize("answer", ["[]", "[1]", '["role"]', '[{"a": 1}]', "[", '{"role": "x"}'])
def test_answers_in_json_that_are_no_messages_are_texts(load, byte_tokenizer, answer):
    row = {"prompt": "a", "chosen": answer, "rejected": "b"}
    assert one_pair(load, byte_tokenizer, row)[0] == ("a", f"{answer}<|end|>")


def test_feedback_on_conversations(load, byte_tokenizer):
    rows = [
        {
            "conversations": [{"from": "human", "value": value}],
            "completion": {"from": "gpt", "value": "good"},
            "label": value == "U",
        }
        for value in "UV"
    ]
    data, _ = load(rows, byte_tokenizer, KtoConfig())
    assert (PROMPT, "good<|stop|>") in text_of(next(data.iterator), byte_tokenizer)


def test_a_column_of_prompts_that_is_left_out(load, byte_tokenizer):
    row = {"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD], "": "index"}
    with pytest.raises(DataError, match=r"leave its column out with columns\.prompt = ''"):
        one_pair(load, byte_tokenizer, row)
    texts = one_pair(load, byte_tokenizer, row, columns={"prompt": ""})
    assert texts == [(PROMPT, "good<|stop|>"), (PROMPT, "bad<|stop|>")]


def test_fields_of_the_template(load, byte_tokenizer):
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "system": "S"}
    (prompt, _), _ = one_pair(load, byte_tokenizer, row)
    assert prompt.startswith("<|start|>system\nS<|stop|>\n<|start|>user")


def test_pairs_stay_together_in_every_batch(load, word_tokenizer):
    rows = [
        {"prompt": f"a {letter}", "chosen": "c " * (n % 3 + 1), "rejected": "d " * (n % 5 + 1)}
        for n, letter in enumerate("efghijklm")
    ]
    data, validation = load(rows, word_tokenizer, batch_size=4, max_length=12)
    assert data.num_rows == validation.num_rows == 9
    assert data.batches_of_epochs(2.0) == 9
    seen = []
    for batch in [*(next(data.iterator) for _ in range(9)), *validation]:
        texts = [text for text in text_of(batch, word_tokenizer) if text[1]]
        for (prompt, chosen), (other, rejected) in zip(texts[::2], texts[1::2], strict=True):
            assert prompt == other and "c" in chosen and "d" in rejected
            seen.append(prompt)
    assert {seen.count(prompt) for prompt in seen} == {3}


def test_unusable_pairs_are_counted_and_left_out(load, word_tokenizer):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": " "},
        {"prompt": "a " * 9, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b " * 9, "rejected": "b " * 9 + "c"},
        {"chosen": "b", "rejected": "b"},  # nor a prompt
    ]
    data, _ = load(rows, word_tokenizer, max_length=6, batch_size=2)
    assert data.num_rows == 1
    file = data.report.partition("(first: ")[2].partition(":")[0]
    for text in (
        f"1 dropped without a remaining target (first: {file}: line 4)",
        f"2 with two equal answers, left out (first: {file}: line 2)",
        f"1 with an empty answer, left out (first: {file}: line 3)",
        f"1 dropped with answers that are equal where they are cut (first: {file}: line 5)",
        "2 truncated to 6 tokens",
        "WARNING: 33% of the rows are lost by their length; raise max_length",
        "answers of 2.0 tokens chosen and 2.0 rejected",
    ):
        assert text in data.report


def test_feedback_has_the_answer_of_the_example_before_after_the_prompt(load, word_tokenizer):
    rows = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "c d", "completion": "e f g", "label": 0},
        {"prompt": "h", "completion": "i", "label": "False"},
    ]
    data, validation = load(rows, word_tokenizer, KtoConfig(), max_length=6)
    assert "1 desirable and 2 undesirable answers" in data.report
    batch = next(data.iterator)
    texts = text_of(batch, word_tokenizer)
    labels = batch.labels.sum(axis=1).tolist()
    pairs = {texts[n]: (texts[n + 1], labels[n : n + 2]) for n in (0, 2, 4)}
    assert pairs == {
        ("<s> a", "b </s>"): (("<s> a", "i </s>"), [1.0, 0.0]),
        ("<s> c d", "e f g"): (("<s> c d", "b </s>"), [0.0, 0.0]),
        ("<s> h", "i </s>"): (("<s> h", "e f g"), [0.0, 0.0]),
    }
    assert sum(len(text_of(b, word_tokenizer)) for b in validation) == 8  # with two of padding


def test_feedback_never_has_another_answer_to_the_same_prompt(load, word_tokenizer):
    rows = [
        {"prompt": prompt, "completion": answer, "label": answer in "bdf"}
        for prompt, answer in zip("ppqqp", "bcdef", strict=True)
    ]
    data, _ = load(rows, word_tokenizer, KtoConfig())
    (examples,) = data.examples
    texts = [word_tokenizer.decode(row.tokens[:-1]) for row in examples.rows(np.arange(5))]
    # Before the first two the last of q, before those of q the last of p.
    assert texts[1::2] == ["<s> p e", "<s> p e", "<s> q c", "<s> q c", "<s> p e"]
    batch = next(data.iterator)
    assert (batch.segment_ids.sum(axis=1) == 4).all()


def test_feedback_needs_two_prompts(load, word_tokenizer):
    rows = [{"prompt": "p", "completion": x, "label": x == "b"} for x in "bc"]
    with pytest.raises(DataError, match=r"data.train.only: all answers are to the same prompt"):
        load(rows, word_tokenizer, KtoConfig())


def test_reference_scores_go_with_their_rows(load, word_tokenizer):
    rows = [{"prompt": x, "chosen": "c", "rejected": "d"} for x in "efgh"]
    data, _ = load(rows, word_tokenizer, batch_size=4)
    (examples,) = data.examples
    first = {tuple(row.tokens): n for n, row in enumerate(examples.rows(np.arange(4)))}
    examples.set_reference_log_probs(-np.arange(8, dtype=np.float32).reshape(4, 2))
    for _ in range(4):
        batch = next(data.iterator)
        for tokens, real, scores in zip(
            batch.tokens, batch.segment_ids > 0, batch.reference_log_probs, strict=True
        ):
            assert scores.sum() == scores[real.sum() - 1] == -first[tuple(tokens[real])]


def test_equal_rows_are_tokenized_once(load, word_tokenizer):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    (data, _), (again, _) = (load(rows, word_tokenizer) for _ in range(2))
    assert data.fingerprint == again.fingerprint
    (first,), (second,) = data.examples, again.examples
    files = [e.source.table.cache_files[0]["filename"] for e in (first, second)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": [BAD]},
            "line 1: chosen is text and rejected messages; give both in the same form",
        ),
        (
            {"prompt": "a", "chosen": 3, "rejected": "c"},
            "line 1: column 'chosen' must be text or a list of messages, got",
        ),
        (
            {"chosen": [GOOD], "rejected": [BAD]},
            "line 1: chosen and rejected share no first message",
        ),
        (
            {"chosen": [USER, USER, GOOD], "rejected": [USER, BAD]},
            "line 1: message 2 of chosen and rejected is the first that differs, and not the",
        ),
        (
            {"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "line 1: chosen is a conversation in which no message of the user is the prompt",
        ),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [BAD]},
            "line 1: chosen holds no message of the role 'assistant'",
        ),
        (
            {"prompt": [GOOD], "chosen": [GOOD], "rejected": [BAD]},
            "line 1: chosen follows no prompt",
        ),
        (
            {"prompt": "", "chosen": "b", "rejected": "c"},
            "line 1: chosen follows no prompt; give the text that it answers",
        ),
        (
            {"chosen": "a b", "rejected": "c b"},
            "line 1: chosen follows no prompt; give the text that it answers",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "system": "S"},
            "line 1: 'system' is for the chat template, and prompt and answers are texts",
        ),
        (
            {
                "prompt": [{"role": "system", "content": "T"}, USER],
                "chosen": [GOOD],
                "rejected": [BAD],
                "system": "S",
            },
            "line 1: the column 'system' and the first message are both system messages",
        ),
    ],
)
def test_refused_pairs(load, byte_tokenizer, row, expected):
    with pytest.raises(DataError, match=expected):
        load([row], byte_tokenizer)


def test_messages_without_a_chat_template(load, word_tokenizer):
    row = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    with pytest.raises(DataError, match="line 1: rendering messages needs a chat template"):
        load([row], word_tokenizer)


def test_an_answer_of_weight_0(load, word_tokenizer):
    row = {"prompt": [USER], "chosen": [{**GOOD, "weight": 0}], "rejected": [BAD]}
    with pytest.raises(DataError, match="line 1: chosen has no turn to learn, since all have the"):
        load([row], word_tokenizer)


def test_no_usable_pair(load, word_tokenizer):
    row = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(DataError, match="no pair has two different answers; leave"):
        load([row], word_tokenizer)
    row = {"prompt": "a " * 9, "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match="two different answers within max_length=4 tokens; raise"):
        load([row], word_tokenizer, max_length=4)


def test_feedback_needs_both_labels(load, word_tokenizer):
    rows = [{"prompt": x, "completion": "b", "label": True} for x in "ac"]
    expected = r"data.train.only: .*rows.jsonl: no undesirable answers among 2"
    with pytest.raises(DataError, match=expected):
        load(rows, word_tokenizer, KtoConfig())


def test_validation_needs_both_labels(write, data_config, word_tokenizer):
    row = {"prompt": "a", "completion": "b", "label": False}
    source = SourceConfig(path=write("rows.jsonl", [row, {**row, "prompt": "c"}]))
    config = data_config(source, validation={"held": source})
    expected = r"data.validation.held: .*rows.jsonl: no desirable answers among 2"
    with pytest.raises(DataError, match=expected):
        load_validation_data(config, word_tokenizer, 4, preference=KtoConfig())


def test_labels_that_are_none(load, word_tokenizer):
    row = {"prompt": "a", "completion": "b", "label": "good"}
    with pytest.raises(DataError, match="line 1: column 'label' must be true or false, got"):
        load([row], word_tokenizer, KtoConfig())


def test_rows_of_another_schema(load, word_tokenizer):
    row = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=r"fit no schema \(preference: chosen, rejected\)"):
        load([row], word_tokenizer)
