"""`moe_jax.generate` on the demo base: equality with transformers, batches, sampling, errors."""

import dataclasses

import jax
import pytest
import torch
import transformers
from inference.tokenizers_to_try import DEMO_BASE

import moe_jax
from moe_jax.config.classification import ClassificationConfig

PROMPTS = ["The cat", "Write the opposite.\n\nempty\n\nand more", "A"]
LORA = moe_jax.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj", "down_proj"))
JUDGE = dataclasses.replace(LORA, classification=ClassificationConfig(glue="cola"))
LENGTH = 12


@pytest.fixture(scope="module")
def base():
    return moe_jax.load_base(DEMO_BASE)


@pytest.fixture(scope="module")
def adapted(base):
    model = moe_jax.AdaptedModel(base, {"mine": LORA, "judge": JUDGE})
    model.adapters["mine"] = jax.tree.map(lambda leaf: leaf + 0.05, model.adapters["mine"])
    return model


@pytest.fixture(scope="module")
def greedy(adapted):
    """The base's answers and the adapter's, in one batch."""
    names = [None] * len(PROMPTS) + ["mine"] * len(PROMPTS)
    texts = moe_jax.generate(adapted, PROMPTS * 2, names, max_new_tokens=LENGTH)
    return texts[: len(PROMPTS)], texts[len(PROMPTS) :]


def test_the_base_equals_transformers_and_the_adapter_differs(greedy):
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_BASE)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_BASE, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, greedy[0], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0]
        before = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert before + answer == tokenizer.decode(whole, skip_special_tokens=True)
    assert greedy[0] != greedy[1]


def test_a_classifier_is_rejected_and_other_adapters_work(adapted, greedy):
    assert greedy[1], "answered, with a classifier in the model"
    with pytest.raises(moe_jax.UserError, match="adapter 'judge': is a classifier"):
        moe_jax.generate(adapted, PROMPTS, ["mine", "judge", None], max_new_tokens=LENGTH)


def test_a_stream_equals_the_text_of_generate(adapted, greedy):
    pieces = list(moe_jax.generate_stream(adapted, PROMPTS[0], "mine", max_new_tokens=LENGTH))
    assert "".join(pieces) == greedy[1][0]
    assert len(pieces) > 1


def test_samples_depend_on_the_seed(adapted):
    def drawn(seed):
        options = dict(temperature=1.5, samples=3, max_new_tokens=LENGTH, batch_size=3)
        return moe_jax.generate(adapted, PROMPTS[:2], "mine", seed=seed, **options)

    six = drawn(1)
    assert len(set(six)) > 3
    assert drawn(1) == six
    assert drawn(2) != six


def test_replaced_weights_take_effect(base):
    model = moe_jax.AdaptedModel(base, {"mine": LORA})
    session = model.session
    assert model.session is session
    replaced = jax.tree.map(lambda leaf: leaf + 1, model.adapters["mine"])
    model.adapters["mine"] = replaced
    assert model.session is not session
    assert model.session.adapters["mine"].tree is replaced
    assert base.session is base.session
    assert base.session.adapters == {}


def test_conversations_use_the_chat_template_without_chat(base, monkeypatch):
    seen = []

    class Nothing:
        def __init__(self, *_, **__): ...

        def stream(self, requests, *_, eos_ids, **__):
            seen.append((requests[0].tokens, eos_ids))
            return iter([[1]])

    monkeypatch.setattr("moe_jax.inference.api.TokenGenerator", Nothing)
    opened = moe_jax.load_base(DEMO_BASE)
    messages = [{"role": "user", "content": "Who?"}]
    assert moe_jax.generate(opened, [messages]) == [""]
    assert moe_jax.generate(opened, "Who?", chat=True) == [""]
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_BASE)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert seen == [(tuple(expected), {tokenizer.eos_token_id})] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "prompts: the list is empty"),
        ((["a", ""],), "prompt 2: is empty"),
        (("",), "the prompt: is empty"),
        (("a", "mne"), "the prompt: adapter 'mne': is not loaded; did you mean"),
        ((["a", "b"], ["mine"]), "adapter: 1 names for 2 prompts"),
        (("a " * 300,), "the prompt: has .* tokens, but the context holds 256"),
    ],
)
def test_invalid_prompts_and_adapters(adapted, arguments, message):
    with pytest.raises(moe_jax.UserError, match=message):
        moe_jax.generate(adapted, *arguments)


def test_invalid_settings(base):
    for options, message in (
        ({"batch_size": 0}, "batch_size: must be a positive number"),
        ({"top_p": 0.5}, "top_p: has no effect"),
        ({"stop": ["a", ""]}, "stop: a stop string is empty"),
    ):
        with pytest.raises(moe_jax.UserError, match=message):
            moe_jax.generate(base, "a", **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        moe_jax.generate(base, "a", temprature=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'samples'"):
        moe_jax.generate_stream(base, "a", samples=2)
