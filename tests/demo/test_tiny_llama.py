"""The tiny Llama's checkpoint and tokenizer, read by transformers."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_jax.demo.corpus import plain_sentences
from moe_jax.demo.tiny_llama import (
    random_tensors,
    save_tokenizer,
    train_tokenizer,
    write_checkpoint,
    write_model,
)


@pytest.mark.parametrize(
    ("shards", "overrides"),
    [
        (1, {}),
        (3, {"attention_bias": True, "mlp_bias": True}),
        (1, {"tie_word_embeddings": False, "head_dim": 24, "dtype": "bfloat16"}),
    ],
)
def test_transformers_reads_every_tensor(tmp_path, shards, overrides):
    hf_config = write_checkpoint(tmp_path, seed=1, shards=shards, **overrides)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype="auto"
    )
    assert not any(report.values()), report
    assert model.dtype == getattr(torch, hf_config["dtype"])
    state = model.state_dict()
    for name, tensor in random_tensors(hf_config, seed=1).items():
        expected = torch.from_numpy(tensor).to(model.dtype)
        assert torch.equal(state[name], expected), name


def test_shards_hold_each_tensor_once(tmp_path):
    hf_config = write_checkpoint(tmp_path, seed=0, shards=3)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    names = []
    for file in files:
        with safe_open(file, framework="np") as tensors:
            names += tensors.keys()
    assert sorted(names) == sorted(random_tensors(hf_config, seed=0))


def test_same_seed_same_weights(tmp_path):
    hf_config = write_checkpoint(tmp_path, seed=0)
    again = random_tensors(hf_config, seed=0)
    other = random_tensors(hf_config, seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    with safe_open(tmp_path / "model.safetensors", framework="np") as tensors:
        np.testing.assert_array_equal(tensors.get_tensor(name), again[name])
    assert not np.array_equal(again[name], other[name])


def test_tensors_of_another_shape_are_rejected(tmp_path):
    hf_config = write_checkpoint(tmp_path, seed=0)
    tensors = random_tensors({**hf_config, "hidden_size": 64}, seed=0)
    with pytest.raises(ValueError, match="config describes"):
        write_model(tmp_path, hf_config, tensors)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(plain_sentences(seed=0, count=500), vocab_size=400), folder)
    return AutoTokenizer.from_pretrained(folder)


def test_any_text_round_trips(tokenizer):
    text = "Sort: d g a k\n12 + 7 — ça va? 漢字 🙂\n\ntwo  spaces "
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_starts_with_bos_and_fills_the_vocabulary(tokenizer):
    assert tokenizer("fox").input_ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert len(tokenizer) == 400


def test_tokens_of_a_word_do_not_depend_on_its_position(tokenizer):
    (inside,) = {*tokenizer("One fox").input_ids[-1:]}
    alone = tokenizer("fox").input_ids[1:]
    after_break = tokenizer("One\n\nfox").input_ids
    assert alone[-1] == inside
    assert after_break[-len(alone) :] == alone


@pytest.mark.parametrize("prompt", ["Write the plural.\n\nfox\n\n", "Answer:\n", "One", "a b:"])
def test_prompt_tokens_are_a_prefix(tokenizer, prompt):
    ids = tokenizer(prompt).input_ids
    joined = tokenizer(prompt + (" foxes" if prompt[-1] != "\n" else "foxes")).input_ids
    assert joined[: len(ids)] == ids


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s>user: Hi.\nassistant: Hello.</s>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>user: Hi.\nassistant: "
