"""Tokenizers: leading and end tokens, digest, and messages about invalid ones."""

import subprocess
import sys

import pytest
from tokenizers import processors

from moe_jax.data.tokenizer import (
    encode_prompt,
    end_of_text,
    leading_tokens,
    load_tokenizer,
    tokenizer_digest,
)
from moe_jax.errors import CheckpointError, DataError


def test_leading_tokens_equal_the_tokenizers(word_tokenizer, byte_tokenizer):
    assert leading_tokens(word_tokenizer) == [1]
    assert leading_tokens(byte_tokenizer) == []
    assert encode_prompt(word_tokenizer, "a c") == [1, 3, 5]
    assert encode_prompt(word_tokenizer, "") == [1]


def test_end_token_added_by_the_tokenizer_is_not_a_leading_token(word_tokenizer, tmp_path):
    word_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("a")["input_ids"] == [1, 3, 2]
    assert leading_tokens(tokenizer) == [1]


def test_a_saved_tokenizer_loads_and_is_the_same(any_tokenizer, tmp_path):
    any_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "a b The fox.\n\n## Answer\nHello"
    assert loaded(text)["input_ids"] == any_tokenizer(text)["input_ids"]


def test_digest_is_the_same_in_another_process_and_after_use(metaspace_tokenizer, tmp_path):
    metaspace_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=False, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before
    code = (
        "from moe_jax.data.tokenizer import *;"
        f"print(tokenizer_digest(load_tokenizer({str(tmp_path)!r})))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == before


def test_digest_follows_vocabulary_special_tokens_and_chat_template(word_tokenizer, tmp_path):
    word_tokenizer.save_pretrained(tmp_path)
    seen = {tokenizer_digest(load_tokenizer(tmp_path))}
    for change in (
        lambda t: t.add_tokens(["zz"]),
        lambda t: setattr(t, "eos_token", "a"),
        lambda t: setattr(t, "chat_template", "{{ messages }}"),
    ):
        tokenizer = load_tokenizer(tmp_path)
        change(tokenizer)
        seen.add(tokenizer_digest(tokenizer))
    assert len(seen) == 4


def test_tokenizer_without_end_token(word_tokenizer, tmp_path):
    word_tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert end_of_text(tokenizer) == 2
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="names no end-of-text token"):
        end_of_text(tokenizer)


def test_folders_without_a_readable_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no tokenizer; copy tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="gone: no such folder"):
        load_tokenizer(tmp_path / "gone")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_hub_id_out_of_reach_is_one_line():
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: its tokenizer cannot") as caught:
        load_tokenizer("nobody/nothing", revision="v1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "module", "package"),
    [
        # A SentencePiece model is a protocol buffer whose first field holds the first piece.
        (b"\n\x0e\n\x05<unk>", "sentencepiece", "sentencepiece"),
        (b"IQ== 0\nIg== 1\n", "tiktoken", "tiktoken"),
    ],
)
def test_missing_packages_for_a_tokenizer_model_alone(
    tmp_path, monkeypatch, capfd, content: bytes, module: str, package: str
):
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    with pytest.raises(CheckpointError, match=rf"pip install {package}\)") as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: has its tokenizer in tokenizer.model only")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_tokenizer_json_needs_no_package(word_tokenizer, tmp_path, monkeypatch):
    word_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == tokenizer_digest(word_tokenizer)


def test_byte_order_mark_in_a_tokenizers_file(word_tokenizer, tmp_path):
    word_tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    with pytest.raises(CheckpointError, match="begins with a byte order mark") as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")
