"""Token ids, loss masks and truncation, against counting by hand."""

import datetime

import numpy as np
import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.data import encoding, token_table
from moe_jax.data import tokenizer as tokenizer_module
from moe_jax.data.encoding import Example, TextSpan, encode_examples
from moe_jax.data.tokenizer import encode_prompt
from moe_jax.errors import DataError


# In the word tokenizer <s> is 1, </s> is 2, a is 3, b is 4, c is 5, and so on.
def test_completion_and_end_of_text_are_the_targets(run, completions):
    rows, result = run(completions([("a b", "c d"), ("", "e"), ("f", "g")]))
    assert rows == [([1, 3, 4, 5, 6, 2], [5, 6, 2]), ([1, 7, 2], [7, 2]), ([1, 8, 9, 2], [9, 2])]
    assert result.report == "only: 3 rows, 0 truncated to 64 tokens, 4.3 tokens a row"


def test_blank_targets_are_kept_and_reported(run, completions, write):
    source = completions([("a", "b"), ("f", ""), ("", "c"), ("g", " \u3000\n")])
    rows, result = run(source)
    assert rows[1] == ([1, 8, 2], [2])
    note = "2 with a blank completion (kept: the model learns to end there; first: {}: line 2)"
    assert result.report.endswith(note.format(source.path))
    path = write("t.jsonl", [{"text": "a"}, {"text": ""}])
    _, result = run(SourceConfig(path=path, schema="text"))
    assert "1 with a blank text (kept" in result.report


def test_the_report_names_files_that_are_not_read(run, write, tmp_path):
    for name in ("d/train-0.jsonl", "d/train-1.jsonl", "d/.old/train-0.jsonl", "d/test.jsonl"):
        write(name, [{"prompt": "a", "completion": "b"}])
    for name in ("d/a.docx", "d/b.docx", "d/README.md"):
        write(name, "")
    _, result = run(SourceConfig(path=str(tmp_path / "d")))
    assert result.report == (
        "only: 2 rows of 2 files (schema 'completion', by their columns), 0 truncated to 64 "
        "tokens, 4.0 tokens a row; skipped 5 (not named after the split: test.jsonl; hidden: "
        ".old/; metadata: README.md; unknown kind: a.docx and 1 more)"
    )


def test_a_schema_by_columns_gives_the_same_rows_and_digest(run, write):
    path = write("d.jsonl", [{"prompt": "a b", "completion": "c"}])
    rows, chosen = run(SourceConfig(path=path))
    expected, given = run(SourceConfig(path=path, schema="completion"))
    assert rows == expected
    assert (chosen.digest, chosen.schema) == (given.digest, "completion")


def test_labels_without_a_classifier_are_refused(run, write):
    path = write("d.jsonl", [{"sentence": "a", "other": "b", "label": 1}])
    columns = {"text": "sentence", "text_pair": "other"}
    with pytest.raises(DataError, match=r"'classification', which needs method\.classification"):
        run(SourceConfig(path=path, columns=columns))


def test_train_on_prompt_makes_all_but_the_first_token_targets(run, completions):
    rows, _ = run(completions([("a b", "c")]), train_on_prompt=True)
    assert rows == [([1, 3, 4, 5, 2], [3, 4, 5, 2])]


def test_instruction_goes_through_its_template(run, write):
    template = write("t.txt", "a {instruction} {input} z\n--- without input ---\na {instruction}")
    path = write(
        "d.json",
        [
            {"instruction": "b", "input": "c", "output": "d"},
            {"instruction": "b", "input": "", "output": "d"},
        ],
    )
    rows, _ = run(SourceConfig(path=path, schema="instruction", prompt=template))
    assert rows == [([1, 3, 4, 5, 28, 6, 2], [6, 2]), ([1, 3, 4, 6, 2], [6, 2])]


def test_long_completion_loses_its_end_and_the_end_of_text(run, completions):
    rows, result = run(completions([("a", "b c d e"), ("a", "b c")]), max_length=5)
    assert rows == [([1, 3, 4, 5, 6], [4, 5, 6]), ([1, 3, 4, 5, 2], [4, 5, 2])]
    assert "2 rows, 1 truncated to 5 tokens" in result.report


def test_row_without_target_left_is_dropped_and_reported(run, completions):
    # max_length 3: the prompt "a b" fills the row, "a" leaves one place.
    rows, result = run(completions([("a", "c"), ("a b", "c"), ("a b d", "e")]), max_length=3)
    assert rows == [([1, 3, 5], [5])]
    assert "3 rows, 3 truncated to 3 tokens, 2 dropped" in result.report
    assert "rows.jsonl: line 2)" in result.report


def test_tokens_are_found_where_they_are_not_cut_off(run, completions, write):
    source = completions([("z y x w", "v"), ("a", "b c d"), ("", "e"), ("f", "g")])
    _, result = run(source, max_length=4)  # <s> a b c, <s> e </s>, <s> f g </s>
    assert result.found_tokens([2, 5, 6, 9, 28, 99]) == {2, 5, 9}
    _, result = run(source)
    assert result.found_tokens([2, 5, 6, 9, 28, 99]) == {2, 5, 6, 9, 28}
    source = SourceConfig(path=write("a.txt", "a b c d e f\n\ng h"), schema="text")
    _, result = run(source, max_length=3)
    assert result.found_tokens(range(30)) == set(range(1, 11))


def test_all_rows_dropped_is_an_error(run, completions):
    with pytest.raises(DataError, match="no row has a target within max_length=3 tokens"):
        run(completions([("a b", "c")]), max_length=3)


def test_long_text_is_divided_so_that_every_token_is_a_target_once(run, write):
    source = SourceConfig(path=write("a.txt", "a b c d e f g\n\na b"), schema="text")
    rows, result = run(source, max_length=4)
    # <s> a b c d e f g </s>: nine tokens, each part begins with the one before it.
    assert rows == [
        ([1, 3, 4, 5], [3, 4, 5]),
        ([5, 6, 7, 8], [6, 7, 8]),
        ([8, 9, 2], [9, 2]),
        ([1, 3, 4, 2], [3, 4, 2]),
    ]
    assert "2 rows, 4 after dividing long ones, 0 truncated" in result.report


@pytest.mark.parametrize("length", range(1, 14))
def test_division_of_text_loses_nothing_at_any_length(run, write, length):
    words = list("abcdefghijklm")[:length]
    rows, _ = run(SourceConfig(path=write("a.txt", " ".join(words)), schema="text"), max_length=4)
    targets = [token for _, target in rows for token in target]
    assert targets == [*range(3, 3 + length), 2]
    assert all(len(ids) <= 4 for ids, _ in rows)


def test_chat_targets_are_the_assistant_turns(run, write, byte_tokenizer):
    talk = [
        {"role": "user", "content": "The fox?"},
        {"role": "assistant", "content": "The dog."},
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": "France."},
    ]
    source = SourceConfig(path=write("c.jsonl", [{"messages": talk}]), schema="chat")
    (row,), _ = run(source, byte_tokenizer, max_length=256)
    rendered = byte_tokenizer.apply_chat_template(talk, tokenize=False)
    assert byte_tokenizer.decode(row[0]) == rendered.rstrip("\n")
    assert byte_tokenizer.decode(row[1]) == "The dog.<|stop|>France.<|stop|>"
    # What generation sees for the second answer is exactly how the row goes on to it.
    prompt = byte_tokenizer.apply_chat_template(talk[:3], add_generation_prompt=True)["input_ids"]
    assert row[0][: len(prompt)] == prompt


# `generation` marks what transformers' own mask counts as the assistant's.
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|stop|>{% endgeneration %}{% else %}{{ m.content }}<|stop|>{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WITH_EOS = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXTS = ["The fox runs.", "naïve 🦊", " Paris ", "", "The dog\n\nsleeps", "What is </s> <|stop|>?"]


def conversation(answers):
    roles = ["user", "assistant"] * answers
    return [{"role": r, "content": TEXTS[n * 5 % 6] or "."} for n, r in enumerate(roles)]


@pytest.mark.parametrize(
    ("fixture", "template"), [("byte_tokenizer", MARKED), ("metaspace_tokenizer", WITH_EOS)]
)
@pytest.mark.parametrize("answers", [1, 2, 12])
def test_conversations_are_encoded_and_masked_as_by_transformers(
    request, run, write, monkeypatch, fixture, template, answers
):
    tokenizer = request.getfixturevalue(fixture)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    talk = conversation(answers)
    expected = tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True)
    ids, is_answer = expected["input_ids"], expected["assistant_masks"]
    source = SourceConfig(path=write("c.jsonl", [{"messages": talk}]), schema="chat")
    last = len(ids) - is_answer[::-1].index(1)  # only line breaks follow
    for max_length in (2000, last - 2, is_answer.index(1) + 3):
        (row,), _ = run(source, tokenizer, max_length=max_length)
        length = min(last, max_length)
        targets = [i for i, learned in zip(ids, is_answer, strict=True) if learned]
        assert row[0] == ids[:length]
        assert row[1] == targets[: sum(is_answer[:length])]


@pytest.fixture
def encoded_characters(monkeypatch):
    """Number of characters of each call of the tokenizer for spans."""
    counts = []

    def counted(tokenizer, texts):
        counts.append(sum(map(len, texts)))
        return tokenizer_module.encode(tokenizer, texts)

    monkeypatch.setattr(encoding, "encode", counted)
    return counts


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_encoded_text_grows_with_the_length_and_ends_with_it(
    run, write, byte_tokenizer, monkeypatch, encoded_characters, template
):
    if template is not None:  # without an end of turn
        monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    monkeypatch.setattr(token_table, "STORED_LENGTH", 64)
    totals = []
    for answers in (20, 80):
        talk = conversation(answers)
        path = write(f"{answers}.jsonl", [{"messages": talk}])
        encoded_characters.clear()
        run(SourceConfig(path=path, schema="chat"), byte_tokenizer, max_length=64)
        assert sum(encoded_characters) < 64 * 50
        encoded_characters.clear()
        run(SourceConfig(path=path, schema="chat"), byte_tokenizer, max_length=100_000)
        totals.append(sum(encoded_characters))
        if template is None:
            rendered = byte_tokenizer.apply_chat_template(talk, tokenize=False)
            # Prompts twice, answers once, and the end of turn in front of each part.
            assert totals[-1] < 2.5 * len(rendered)
    assert template is not None or totals[1] < 4.2 * totals[0]


def test_answers_of_weight_0_are_not_learned_even_with_their_prompts(run, write, byte_tokenizer):
    talk = [
        {"role": "user", "content": "The fox?"},
        {"role": "assistant", "content": "Red.", "weight": 0},
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": "France.", "weight": 1},
    ]
    path = write("c.jsonl", [{"messages": talk}])
    ((ids, targets),), _ = run(SourceConfig(path=path, schema="chat"), byte_tokenizer)
    assert byte_tokenizer.decode(targets) == "France.<|stop|>"
    ((same, targets),), _ = run(
        SourceConfig(path=path, schema="chat"), byte_tokenizer, train_on_prompt=True
    )
    whole = byte_tokenizer.decode(ids)
    assert (same, byte_tokenizer.decode(ids[:1] + targets)) == (
        ids,
        whole.replace("Red.<|stop|>", ""),
    )


def test_report_counts_what_is_lost_of_conversations(run, write, byte_tokenizer):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [
        {"messages": [user, answer]},
        {"messages": [user, answer], "tools": [{"name": "f"}]},
        {"messages": [user, {**answer, "content": " \n"}]},
        {"messages": [user, {**answer, "content": ""}, user, answer], "tools": [{"name": "g"}]},
        {"messages": [user, {**answer, "content": "", "weight": 0}]},
    ]
    path = write("c.jsonl", rows)
    found, result = run(SourceConfig(path=path, schema="chat"), byte_tokenizer)
    assert len(found) == 4
    for part in (
        "only: 5 rows, ",
        f"2 with tools that the chat template leaves out (first: {path}: line 2)",
        f"2 with a blank answer (first: {path}: line 3)",
        f"1 with answers of weight 0 only, left out (first: {path}: line 5)",
    ):
        assert part in result.report


PAIRS = [
    ("## Answer\n", "Red, green and blue."),
    ("What is the capital", " of France?"),
    ("The quick br", "own fox"),  # one word of the corpus, cut in the middle
    ("Answer:\n", "\nHello"),
    ("Paris ", " is"),
    ("", "The dog"),
    ("Hello", "Hello"),
    ("naïve 🦊", "🦊 ï"),
]


@pytest.mark.parametrize("fixture", ["metaspace_tokenizer", "byte_tokenizer"])
@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_boundary_is_exact(request, fixture, prompt, completion):
    """A row begins with what generation sees, and reads as prompt and completion joined."""
    tokenizer = request.getfixturevalue(fixture)
    example = Example(
        (TextSpan(prompt, False), TextSpan(completion, True)), add_bos=True, add_eos=True
    )
    ((ids, mask),) = encode_examples([example], tokenizer, train_on_prompt=False)
    seen = encode_prompt(tokenizer, prompt)
    assert ids[: len(seen)] == seen
    assert mask == [False] * len(seen) + [True] * (len(ids) - len(seen))
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


def test_pairs_do_fuse_across_the_boundary(byte_tokenizer, metaspace_tokenizer):
    """Otherwise the test above would not reach the second way of encoding."""
    fused = {
        tokenizer: sum(
            tokenizer.encode(prompt + completion, add_special_tokens=False)[: len(ids)] != ids
            for prompt, completion in PAIRS
            for ids in [tokenizer.encode(prompt, add_special_tokens=False)]
        )
        for tokenizer in (byte_tokenizer, metaspace_tokenizer)
    }
    assert min(fused.values()) >= 1


def test_dates_stay_text(run, write, byte_tokenizer):
    day = datetime.date(2020, 1, 1).isoformat()
    path = write("d.jsonl", [{"prompt": day, "completion": day}])
    ((ids, _),), _ = run(SourceConfig(path=path, schema="completion"), byte_tokenizer)
    assert byte_tokenizer.decode(ids[:-1]) == day + day


def test_problems_of_template_and_tokenizer_come_before_the_data(run, word_tokenizer, tmp_path):
    gone = {"path": "/no/such.json"}
    with pytest.raises(DataError, match="no such file or template of this package; did you mean"):
        run(SourceConfig(**gone, schema="instruction", prompt="instructoin"))
    with pytest.raises(DataError, match="needs a chat template"):
        run(SourceConfig(**gone, schema="chat"))
    word_tokenizer.save_pretrained(tmp_path)
    tokenizer = type(word_tokenizer).from_pretrained(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-text token"):
        run(SourceConfig(**gone, schema="text"), tokenizer)


def test_tokenizer_needs_no_pad_token(run, completions, word_tokenizer):
    assert word_tokenizer.pad_token is None
    _, result = run(completions([("a", "b")]))
    (row,) = result.sequences(np.array([0]))
    assert row.tokens.tolist() == [1, 3, 4, 2]
    assert np.array_equal(result.lengths, [4])
