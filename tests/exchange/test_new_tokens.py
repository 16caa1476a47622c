"""Adapters with new tokens in peft and as whole models, compared with transformers."""

import numpy as np
import peft
import pytest
import torch
from foreign_adapters import LORA, LORAMOE, MIXLORA, peft_logits, random_adapter
from hf_models import tiny_model
from safetensors.torch import load_file
from tolerances import FLOAT32_LOGITS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

import moe_jax
from moe_jax.demo.tiny_llama import save_tokenizer, train_tokenizer

TOKENS = ["<tool>", "</tool>"]
TEXT = "a fox <tool>sees</tool> the<tool>dog"
USED = 264
"""Tokens of the base's tokenizer."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Bases by name: with a head or tied, as long as the tokenizer or padded."""
    root = tmp_path_factory.mktemp("bases")
    tokenizer = train_tokenizer(["the fox sees the dog"] * 4, vocab_size=USED)
    assert len(tokenizer) == USED
    for name, tied, size in (("head", False, USED), ("tied", True, USED), ("padded", False, 272)):
        model = tiny_model("llama", vocab_size=size, tie_word_embeddings=tied)
        model.save_pretrained(root / name)
        save_tokenizer(tokenizer, root / name)
    return root


def adapter_on(folder, method):
    base = moe_jax.load_base(folder)
    method = {**method, "new_tokens": TOKENS, "new_token_id": USED}
    adapter = random_adapter(method, base.config, str(folder), spread=0.1)
    return base, adapter._replace(base=base.identity)


def ids_of(folder):
    """Ids of `TEXT` by a tokenizer that transformers loads, and by `add_special_tokens`."""
    ids = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    assert ids.count(USED) == 2 and ids.count(USED + 1) == 1
    return np.array([ids])


def logits_of(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("name", ["head", "tied", "padded"])
def test_peft(folders, tmp_path, name):
    base, adapter = adapter_on(folders / name, LORA)
    notes = moe_jax.export_adapter(adapter, "peft", tmp_path / "out")
    reference = AutoModelForCausalLM.from_pretrained(folders / name, dtype=torch.float32)
    if name == "padded":
        assert notes == []
    else:
        assert notes[0].endswith(f"base.resize_token_embeddings({USED + 2})")
        reference.resize_token_embeddings(USED + 2)
    tokens = ids_of(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").all_special_ids
    expected = np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(tokens, "x"))
    before = logits_of(reference, tokens)
    actual = peft_logits(reference, tmp_path / "out", tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32_LOGITS)
    assert np.abs(before - expected).max() > 0.1


@pytest.mark.parametrize("name", ["head", "tied"])
def test_tensors_have_pefts_names(folders, tmp_path, name):
    """peft saves an adapter of its own with the same tensors, if it leaves the base's out."""
    _, adapter = adapter_on(folders / name, LORA)
    moe_jax.export_adapter(adapter, "peft", tmp_path / "out")
    config = peft.PeftConfig.from_pretrained(tmp_path / "out")
    config.inference_mode = False
    reference = AutoModelForCausalLM.from_pretrained(folders / name)
    reference.resize_token_embeddings(USED + 2)
    model = peft.get_peft_model(reference, config)
    model.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    shapes = [
        {key: value.shape for key, value in load_file(folder / file).items()}
        for folder in (tmp_path / "out", tmp_path / "own")
        for file in ("adapter_model.safetensors",)
    ]
    assert shapes[0] == shapes[1]


def test_a_classifier_in_peft(folders, tmp_path):
    method = {**LORA, "classification": {"labels": ["a", "b", "c"]}}
    base, adapter = adapter_on(folders / "padded", method)
    moe_jax.export_adapter(adapter, "peft", tmp_path / "out")
    reference = LlamaForSequenceClassification.from_pretrained(
        folders / "padded", num_labels=3, pad_token_id=None
    )
    tokens = ids_of(tmp_path / "out")
    expected = moe_jax.AdaptedModel(base, {"x": adapter})(tokens, "x")
    actual = peft_logits(reference, tmp_path / "out", tokens)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32_LOGITS)


@pytest.mark.parametrize("name", ["head", "tied", "padded"])
@pytest.mark.parametrize(("to", "method"), [("llama", LORA), ("mixtral", MIXLORA)])
def test_whole_models(folders, tmp_path, name, to, method):
    base, adapter = adapter_on(folders / name, method)
    assert moe_jax.export_adapter(adapter, to, tmp_path / "out") == []
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    size = 272 if name == "padded" else USED + 2
    assert model.config.vocab_size == size
    assert model.get_input_embeddings().weight.shape[0] == size
    tokens = ids_of(tmp_path / "out")
    expected = np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(tokens, "x"))
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=0, atol=FLOAT32_LOGITS)


def test_the_tokenizer_is_that_of_add_special_tokens(folders, tmp_path):
    _, adapter = adapter_on(folders / "head", LORA)
    moe_jax.export_adapter(adapter, "llama", tmp_path / "out")
    expected = AutoTokenizer.from_pretrained(folders / "head")
    expected.add_special_tokens({"additional_special_tokens": TOKENS})
    actual = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert actual(TEXT).input_ids == expected(TEXT).input_ids
    for skip in (False, True):
        ids = expected(TEXT).input_ids
        texts = [t.decode(ids, skip_special_tokens=skip) for t in (actual, expected)]
        assert texts[0] == texts[1]
    assert actual.added_tokens_decoder == expected.added_tokens_decoder


def test_measured_merging_reads_new_tokens(folders, tmp_path):
    base, adapter = adapter_on(folders / "head", MIXLORA)
    text = tmp_path / "text.txt"
    text.write_text(" ".join([TEXT] * 20))
    notes = moe_jax.export_adapter(adapter, "llama", tmp_path / "out", data=text)
    assert notes[0].startswith("KL divergence")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.vocab_size == base.config.vocab_size + 2


def test_moe_peft_refuses_them(folders, tmp_path):
    _, adapter = adapter_on(folders / "head", LORAMOE)
    with pytest.raises(moe_jax.UserError, match=r"cannot express new_tokens .*--to moe_jax"):
        moe_jax.export_adapter(adapter, "mixlora", tmp_path / "out")
    assert not (tmp_path / "out").exists()
