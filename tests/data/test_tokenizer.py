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
