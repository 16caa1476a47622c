"""The cache of encoded rows: when a table is made again, and when it is not."""

from dataclasses import replace
from pathlib import Path

import pytest

from moe_jax.config.data import SourceConfig
from moe_jax.data import table_cache, token_table
from moe_jax.data import tokenizer as tokenizer_module


@pytest.fixture
def calls(monkeypatch):
    """Counts the batches that are tokenized, not read from the cache."""
    counted = []
    original = token_table.encode_examples
    monkeypatch.setattr(
        token_table,
        "encode_examples",
        lambda *arguments: counted.append(len(arguments[0])) or original(*arguments),
    )
    return counted


def test_second_call_is_served_from_the_cache(run, completions, calls):
    source = completions([("a", "b"), ("c", "d")])
    first, result = run(source)
    second, again = run(source)
    assert calls == [2]
    assert first == second
    assert (again.report, again.digest) == (result.report, result.digest)


def test_tables_are_made_again_for_another_version_data_or_tokenizer_alone(
    run, completions, calls, monkeypatch, tmp_path, word_tokenizer
):
    source = completions([("a", "b"), ("c", "d")])
    run(source)
    assert calls == [2]

    with monkeypatch.context() as unreadable:  # a key does not depend on the package's own files
        unreadable.setattr(Path, "read_text", None)
        unreadable.setattr(Path, "read_bytes", None)
        run(replace(source, weight=2.0, expert_group=1))
        run(source, sort_window=1, buckets=(8,), packing="first_fit", num_workers=1)
    assert calls == [2]

    for module, name, value in [
        (table_cache, "TOKEN_CACHE_VERSION", table_cache.TOKEN_CACHE_VERSION + 1),
        # The modules that the code sees: another test may have imported a library again.
        (table_cache.datasets, "__version__", "99"),
        (tokenizer_module.transformers, "__version__", "99"),
        (tokenizer_module.tokenizers, "__version__", "99"),
    ]:
        with monkeypatch.context() as other:
            other.setattr(module, name, value)
            run(source)
            assert calls == [2, 2], name
            calls.pop()
    run(source)
    assert calls == [2]

    word_tokenizer.save_pretrained(tmp_path / "other")
    tokenizer = type(word_tokenizer).from_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["new"])
    run(source, tokenizer)
    assert calls == [2, 2]
    run(completions([("a", "b"), ("c", "e")]))
    assert calls == [2, 2, 2]


def test_every_input_of_the_tokens_changes_the_cache(run, write, calls, tmp_path, word_tokenizer):
    row = {"instruction": "b", "input": "", "output": "c", "other": "d"}
    path = write("d.jsonl", [row])
    template = write("t.txt", "a {instruction}")
    source = {"path": path, "schema": "instruction", "prompt": template}
    rows, _ = run(SourceConfig(**source))
    assert rows == [([1, 3, 4, 5, 2], [5, 2])]

    rows, _ = run(SourceConfig(**source, columns={"output": "other"}))
    assert rows == [([1, 3, 4, 6, 2], [6, 2])]
    rows, _ = run(SourceConfig(**source), train_on_prompt=True)
    assert rows == [([1, 3, 4, 5, 2], [3, 4, 5, 2])]
    word_tokenizer.save_pretrained(tmp_path / "other")
    other = type(word_tokenizer).from_pretrained(tmp_path / "other")
    other.eos_token = "z"
    rows, _ = run(SourceConfig(**source), other)
    assert rows == [([1, 3, 4, 5, 28], [5, 28])]
    write("t.txt", "z {instruction}")
    rows, _ = run(SourceConfig(**source))
    assert rows == [([1, 28, 4, 5, 2], [5, 2])]
    write("d.jsonl", [{**row, "instruction": "e"}])
    rows, _ = run(SourceConfig(**source))
    assert rows == [([1, 28, 7, 5, 2], [5, 2])]
    assert len(calls) == 6
    # Every smaller max_length reads the same table, which a larger one makes again.
    rows, _ = run(SourceConfig(**source), max_length=4)
    assert rows == [([1, 28, 7, 5], [5])]
    assert len(calls) == 6
    run(SourceConfig(**source), max_length=token_table.STORED_LENGTH + 1)
    assert len(calls) == 7


def test_data_of_a_template_with_a_date_is_the_same_every_day(
    run, write, byte_tokenizer, monkeypatch, calls
):
    undated = byte_tokenizer.chat_template
    dated = "{{ strftime_now('%d %b %Y') }} {{ tools[0].function.name }}" + undated
    monkeypatch.setattr(byte_tokenizer, "chat_template", dated)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": talk, "tools": [{"name": "f"}]}]
    source = SourceConfig(path=write("c.jsonl", rows), schema="chat")
    ((ids, _),), first = run(source, byte_tokenizer)
    assert byte_tokenizer.decode(ids).startswith("26 Jul 2024 f<|start|>")
    assert "the chat template's date is 2024-07-26 (data.date)" in first.report
    ((ids, _),), other = run(source, byte_tokenizer, date="2023-01-02")
    assert byte_tokenizer.decode(ids).startswith("02 Jan 2023 f<|start|>")
    assert other.digest != first.digest
    assert calls == [1, 1]
    # Without a date in the template it changes nothing, not even the cache.
    monkeypatch.setattr(byte_tokenizer, "chat_template", undated)
    _, first = run(source, byte_tokenizer)
    _, other = run(source, byte_tokenizer, date="2023-01-02")
    assert (other.digest, other.report) == (first.digest, first.report)
    assert "data.date" not in first.report
    assert calls == [1, 1, 1]
