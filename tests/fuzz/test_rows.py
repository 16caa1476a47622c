"""Rows of data sets: files of several kinds, conversations, and chat templates."""

import gzip
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from fuzz.inputs import attempt, damaged, fuzz, json_texts, mutated
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config.data import Schema, SourceConfig
from moe_jax.data.chat_template import ChatTemplate
from moe_jax.data.encoding import encode_examples, make_examples
from moe_jax.data.sources import iterate_rows
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import DataError

CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
            ],
        },
        {"role": "tool", "content": "4"},
        {"from": "gpt", "value": "4", "weight": 1},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    "documents": [{"title": "t", "text": "x"}],
    "chat_template_kwargs": {"enable_thinking": False},
}
COMPLETION = {"prompt": "2 + 2 =", "completion": " 4"}
CLASSIFICATION = {"text": "good", "text_pair": "fine", "label": 1}
PREFERENCE = {
    "prompt": [{"role": "user", "content": "Which?"}],
    "chosen": [{"role": "assistant", "content": "This."}],
    "rejected": "That.",
    "system": "Be brief.",
}
FEEDBACK = {"prompt": "2 + 2 =", "completion": " 4", "label": True}
ROWS: dict[Schema, dict[str, Any]] = {
    "preference": PREFERENCE,
    "feedback": FEEDBACK,
    "chat": CONVERSATION,
    "completion": COMPLETION,
    "classification": CLASSIFICATION,
}
TABLE = pa.table({"prompt": ["a", "b"] * 20, "completion": ["c", None] * 20})


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("moe_jax/demo/base")


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(TABLE, sink)
    return sink.getvalue().to_pybytes()


def _arrow() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


_CSV = b'prompt,completion\r\n"a ""quoted"" one",b\n"two\nlines",c\n'
FILES = {
    "rows.csv": damaged(_CSV),
    "rows.tsv": damaged(_CSV.replace(b",", b"\t")),
    "rows.txt": damaged("text\n\nmore \N{SNOWMAN} text\n".encode()),
    "rows.jsonl.gz": damaged(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 9, mtime=0)),
    "rows.parquet": damaged(_parquet()),
    "rows.arrow": damaged(_arrow()),
}


@fuzz(quick=120, share=0.2)
@given(
    st.sampled_from(list(ROWS)).flatmap(
        lambda schema: st.tuples(st.just(schema), json_texts(ROWS[schema]))
    ),
    st.booleans(),
)
def test_json_rows(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, row: Any, as_list: bool
):
    schema, text = row
    file = tmp_path_factory.getbasetemp() / "fuzz_rows.json"
    file.write_bytes(b"[" + text + b"]" if as_list else text.replace(b"\n", b" ") + b"\n")

    with attempt("rows of JSON"):
        source = SourceConfig(path=str(file), schema=schema)
        for checked in iterate_rows(source, None):
            if schema != "classification":
                examples = make_examples(checked, schema, None, tokenizer)
                encode_examples(examples, tokenizer, train_on_prompt=False, max_length=64)


@fuzz(quick=60, share=0.1)
@given(st.sampled_from(list(FILES)).flatmap(lambda name: st.tuples(st.just(name), FILES[name])))
def test_tables(tmp_path_factory: pytest.TempPathFactory, named: tuple[str, bytes]):
    name, content = named
    file = tmp_path_factory.getbasetemp() / f"fuzz_{name}"
    file.write_bytes(content)

    with attempt("rows of tables"):
        schema: Schema = "text" if name == "rows.txt" else "completion"
        list(iterate_rows(SourceConfig(path=str(file), schema=schema), None))


TEMPLATES = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[0]['content'] | tojson }}{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{% include 'x' %}",
    "{{ messages[99].role }}",
    "{{ '%d' % 'a' }}",
]
"""Templates that ask for what they may not have, or are wrong."""


@pytest.mark.parametrize("template", TEMPLATES)
def test_hostile_templates(template: str, monkeypatch: pytest.MonkeyPatch):
    hostile = load_tokenizer("moe_jax/demo/base")
    monkeypatch.setattr(hostile, "chat_template", template)

    with pytest.raises(DataError, match="row 1: the chat template"):
        ChatTemplate(hostile, "row 1").render([{"role": "user", "content": "hi"}])


@fuzz(quick=40, share=0.08)
@given(mutated([{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]))
def test_messages_in_a_template(tokenizer: Any, messages: Any):
    with attempt("messages in a template"):
        ChatTemplate(tokenizer, "row 1").render(messages if isinstance(messages, list) else [])
