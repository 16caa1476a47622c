"""Tokenizers with new tokens, against `add_special_tokens` of transformers."""

import dataclasses

import pytest
from hf_models import save_tiny_llama
from transformers import AutoTokenizer

import moe_jax
from moe_jax.data.new_tokens import load_extended_tokenizer, with_token_id
from moe_jax.data.tokenizer import tokenizer_digest
from moe_jax.demo.tiny_llama import save_tokenizer, train_tokenizer
from moe_jax.hf.base_model import open_base

TOKENS = ("<a>", "</a>")
METHOD = moe_jax.LoraConfig(rank=2, alpha=2.0, target_modules=("q_proj",), new_tokens=TOKENS)
TEXT = "x<a>the fox </a> <a>"


def base_of(folder, size):
    save_tiny_llama(folder, vocab_size=size)
    save_tokenizer(train_tokenizer(["the fox sees"], vocab_size=264), folder)
    return open_base(folder)


@pytest.mark.parametrize("size", [264, 265, 300])
def test_ids_are_those_of_add_special_tokens(tmp_path, size):
    base = base_of(tmp_path, size)
    expected = AutoTokenizer.from_pretrained(tmp_path)
    expected.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    method = with_token_id(METHOD, base)
    assert method.new_token_id == expected.convert_tokens_to_ids("<a>") == 264
    assert with_token_id(method, base) == method
    plain = load_extended_tokenizer(base.folder, base.config, [None])
    assert len(plain) == 264
    for visible in (False, True):
        methods = [method, None, dataclasses.replace(METHOD, new_tokens=())]
        actual = load_extended_tokenizer(base.folder, base.config, methods, visible=visible)
        assert actual(TEXT).input_ids == expected(TEXT).input_ids
        assert ("<a>" in actual.decode(actual(TEXT).input_ids, skip_special_tokens=True)) == visible
        assert tokenizer_digest(actual) != tokenizer_digest(plain)


def test_refusals(tmp_path):
    base = base_of(tmp_path, 264)
    fits = with_token_id(METHOD, base)
    other = dataclasses.replace(fits, new_tokens=("<b>", "</b>"))
    with pytest.raises(moe_jax.UserError, match=r"different ones \(<a>, </a> and <b>, </b>\)"):
        load_extended_tokenizer(base.folder, base.config, [fits, other])
    moved = dataclasses.replace(fits, new_token_id=263)
    with pytest.raises(moe_jax.UserError, match=r"gives '<a>' the id 264, but .* with 263"):
        load_extended_tokenizer(base.folder, base.config, [moved])
    with pytest.raises(moe_jax.UserError, match=r"new_token_id: 263, but .* the id 264"):
        with_token_id(moved, base)
    small = base_of(tmp_path / "small", 262)
    with pytest.raises(moe_jax.UserError, match=r"next id .* is 264, but .* 262 tokens only"):
        with_token_id(METHOD, small)
