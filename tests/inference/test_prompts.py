"""Prompts: leading tokens, templates, conversations, and errors."""

import dataclasses

import pytest
from inference.tokenizers_to_try import byte_level, sentence_piece

import moe_jax
from moe_jax.config.classification import ClassificationConfig
from moe_jax.data.chat_template import end_of_turn
from moe_jax.errors import UserError
from moe_jax.inference.limits import check_prompts
from moe_jax.inference.prompts import Prompt, PromptEncoder
from moe_jax.inference.settings import PromptFormat

CHAT = byte_level()  # <s> is 0, </s> is 1, and there is a chat template
LORA = moe_jax.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))


def test_a_plain_prompt_has_the_leading_tokens_of_the_tokenizer():
    tokens = PromptEncoder(CHAT, PromptFormat()).text("Who?", "here")
    assert list(tokens) == CHAT("Who?").input_ids
    plain = sentence_piece()  # adds nothing by itself
    assert list(PromptEncoder(plain, PromptFormat()).text("a b", "here")) == plain("a b").input_ids


def test_an_instruction_fills_the_template():
    encoder = PromptEncoder(CHAT, PromptFormat(template="question"))
    assert list(encoder.text("Who?", "x")) == CHAT("Question: Who?\nAnswer:\n").input_ids
    expected = CHAT("Context: Ann.\nQuestion: Who?\nAnswer:\n").input_ids
    assert list(encoder.text("Who?", "x", "Ann.")) == expected


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_equals_that_of_transformers(system):
    encoder = PromptEncoder(CHAT, PromptFormat(chat=True, system=system))
    begin = [] if system is None else [{"role": "system", "content": system}]
    messages = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ann"},
        {"role": "user", "content": "Why?"},
    ]
    expected = CHAT.apply_chat_template(begin + messages, add_generation_prompt=True)
    assert list(encoder.conversation(messages, "x")) == list(expected["input_ids"])
    one = CHAT.apply_chat_template(begin + messages[:1], add_generation_prompt=True)
    assert list(encoder.text("Who?", "x")) == list(one["input_ids"])
    # One that has a system message of its own keeps it.
    with_system = [{"role": "system", "content": "Own."}, *messages]
    expected = CHAT.apply_chat_template(with_system, add_generation_prompt=True)
    assert list(encoder.conversation(with_system, "x")) == list(expected["input_ids"])


def test_the_token_that_ends_a_turn():
    assert end_of_turn(CHAT) == CHAT.eos_token_id
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im|>", "<|im|>end"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + m['content'] + '<|im|>end\\n' }}{% endfor %}"
    )
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im|>end")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chat": True, "template": "bare"}, "template: .* give it or `chat`, not both"),
        ({"system": "x"}, "system: .* give `chat` too"),
    ],
)
def test_contradictory_formats(fields, message):
    with pytest.raises(UserError, match=message):
        PromptFormat(**fields)


def test_without_a_chat_template():
    with pytest.raises(UserError, match=r"chat: the tokenizer .* has no chat template; add"):
        PromptEncoder(sentence_piece(), PromptFormat(chat=True))
    encoder = PromptEncoder(sentence_piece(), PromptFormat())
    with pytest.raises(UserError, match=r"line 3: the tokenizer .* has no chat template"):
        encoder.conversation([{"role": "user", "content": "a"}], "line 3")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list of messages, got 'hello'"),
        ([], "must be a list of messages"),
        ([{"role": "user"}], "message 1: must have the strings 'role' and 'content'"),
        (["hi"], "message 1: must have the strings"),
        ([{"role": "assistant", "content": "a"}], "ends with the assistant"),
    ],
)
def test_invalid_conversations(messages, message):
    with pytest.raises(UserError, match=message):
        PromptEncoder(CHAT, PromptFormat(chat=True)).conversation(messages, "x")


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt(text):
    with pytest.raises(UserError, match="prompt 2: is empty"):
        PromptEncoder(CHAT, PromptFormat(chat=True)).text(text, "prompt 2")


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_that_is_not_unicode(chat):  # a byte of the command line that is not UTF-8
    with pytest.raises(UserError, match="prompt 2 holds an unpaired surrogate"):
        PromptEncoder(CHAT, PromptFormat(chat=chat)).text("caf\udce9", "prompt 2")


def test_an_input_requires_a_template():
    with pytest.raises(UserError, match="prompt 2: has an input, which only a prompt template"):
        PromptEncoder(CHAT, PromptFormat()).text("a", "prompt 2", "material")


@pytest.mark.parametrize(
    ("tokens", "adapter", "message"),
    [
        ([1] * 20, None, "x: has 20 tokens, but the context holds 20, answer included"),
        ([1] * 16, None, "x: has 16 tokens, and with 5 new tokens .* 20; .* at most 4 new tokens"),
        ([1, 9], None, "x: has ids from 1 to 9, but the base has embeddings for 0 to 8"),
        ([], None, "x: has no tokens"),
        ([1], "judge", "adapter 'judge': is a classifier .* that it cannot generate text"),
        ([1], "mne", "x: adapter 'mne': is not loaded; did you mean 'mine'"),
    ],
)
def test_rejected_prompts(tokens, adapter, message):
    judge = dataclasses.replace(LORA, classification=ClassificationConfig(glue="cola"))
    adapters = {"mine": LORA, "judge": judge}
    limits = dict(max_new_tokens=5, context=20, vocab_size=9, adapters=adapters)
    check_prompts([Prompt((1,) * 15, "mine", "fits")], **limits)
    with pytest.raises(UserError, match=message):
        check_prompts([Prompt(tuple(tokens), adapter, "x")], **limits)


@pytest.mark.parametrize(
    ("length", "new_tokens", "context", "ways"),
    [
        (4, 5, 20, ["at most 4 new tokens", "shorten it to 3 tokens", "of more than 8 tokens"]),
        (8, 5, 20, ["shorten it to 3 tokens", "of more than 8 tokens"]),  # no new token at all
        (4, 9, 20, ["at most 4 new tokens", "of more than 8 tokens"]),
        (8, 5, 13, ["shorten it to 3 tokens"]),  # 9 tokens and 5 new ones would be 14
        (8, 12, 20, ["shorten it, and ask for fewer new tokens"]),
    ],
)
def test_an_answer_stays_on_one_side_of_a_change_of_frequencies(length, new_tokens, context, ways):
    def check(tokens, new_tokens):
        prompt = ((1,) * tokens, None, "x")
        limits = dict(context=context, vocab_size=9, adapters={}, switch_length=8)
        check_prompts([prompt], max_new_tokens=new_tokens, **limits)

    with pytest.raises(UserError, match="passes 8, where this") as refused:
        check(length, new_tokens)
    remedies = str(refused.value).split("frequencies; ")[1].split(", or ")
    assert len(remedies) == len(ways)
    for advice, way in zip(remedies, ways, strict=True):
        assert way in advice
    # What is advised is accepted.
    if length < 8:
        check(length, 8 - length)
    if new_tokens < 8:
        check(8 - new_tokens, new_tokens)
    if any("more than" in way for way in ways):
        check(9, new_tokens)
