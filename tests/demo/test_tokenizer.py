import pytest
from transformers import AutoTokenizer

from moe_jax.demo.corpus import plain_sentences
from moe_jax.demo.tiny_llama import save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(plain_sentences(seed=0, count=500), vocab_size=400), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_any_text_survives(tokenizer):
    text = "Sort: d g a k\n12 + 7 — ça va? 漢字 🙂\n\ntwo  spaces "
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_starts_with_bos_and_fills_the_vocabulary(tokenizer):
    assert tokenizer("fox").input_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert len(tokenizer) == 400


def test_a_word_is_the_same_wherever_it_stands(tokenizer):
    (inside,) = {*tokenizer("One fox").input_ids[-1:]}
    alone = tokenizer("fox").input_ids[1:]
    after_break = tokenizer("One\n\nfox").input_ids
    assert alone[-1] == inside
    assert after_break[-len(alone) :] == alone


@pytest.mark.parametrize("prompt", ["Write the plural.\n\nfox\n\n", "Answer:\n", "One", "a b:"])
def test_a_prompt_begins_its_completion(tokenizer, prompt):
    ids = tokenizer(prompt).input_ids
    joined = tokenizer(prompt + (" foxes" if prompt[-1] != "\n" else "foxes")).input_ids
    assert joined[: len(ids)] == ids


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s>user: Hi.\nassistant: Hello.</s>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>user: Hi.\nassistant: "
