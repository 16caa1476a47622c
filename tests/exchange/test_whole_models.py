"""Exports of a base and its adapter as one model, compared with transformers."""

import gc
import json
import tracemalloc

import numpy as np
import pytest
import torch
from foreign_adapters import LORA, MIXLORA
from hf_models import TINY_SIZES, tiny_model
from safetensors.torch import load_file, save_file
from tolerances import BFLOAT16_TENSORS, FLOAT32_LOGITS
from transformers import AutoModelForCausalLM, MixtralForCausalLM, Qwen3MoeForCausalLM
from whole_models import adapter_of, saved_base, tensors_of

import moe_jax
from moe_jax.exchange import whole_model

TOKENS = np.random.default_rng(0).integers(0, TINY_SIZES["vocab_size"], (2, 16))

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TOP_1_OF_3 = {"num_experts": 3, "router": {"name": "top_k", "top_k": 1, "jitter_noise": 0.1}}

NOTES = ["no tokenizer: the base's folder has none; copy one into the export"]


def moe_jax_logits(base, adapter=None):
    if adapter is None:
        return np.asarray(moe_jax.AdaptedModel(base, {})(TOKENS))
    return np.asarray(moe_jax.AdaptedModel(base, {"x": adapter})(TOKENS, "x"))


def transformers_logits(folder, cls=AutoModelForCausalLM):
    """Logits of a checkpoint in transformers, without missing or unexpected tensors."""
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize(
    ("model_type", "overrides", "method", "cls"),
    [
        ("llama", {"rope_parameters": LLAMA3, "head_dim": 12}, MIXLORA, MixtralForCausalLM),
        (
            "mistral",
            {"sliding_window": 5, "tie_word_embeddings": True, "eos_token_id": 5},
            {**MIXLORA, **TOP_1_OF_3, "rslora": True, "target_modules": ["v_proj", "down_proj"]},
            MixtralForCausalLM,
        ),
        (
            "llama",
            {},
            {**MIXLORA, "dora": True, "expert_lora": {"rank": 2, "alpha": 3.0}, "dropout": 0.2},
            MixtralForCausalLM,
        ),
        (
            "qwen3",
            {"head_dim": 16, "attention_bias": True, "use_sliding_window": False},
            {**MIXLORA, "expert_lora": {"dora": True}},
            Qwen3MoeForCausalLM,
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
            {**MIXLORA, **TOP_1_OF_3},
            Qwen3MoeForCausalLM,
        ),
    ],
)
def test_mixlora_as_a_mixture_of_experts(tmp_path, model_type, overrides, method, cls):
    base = saved_base(tmp_path / "base", model_type, **overrides)
    adapter = adapter_of(base, method)
    assert moe_jax.export_adapter(adapter, "mixtral", tmp_path / "out") == NOTES
    expected = moe_jax_logits(base, adapter)
    assert np.abs(expected - moe_jax_logits(base)).max() > 1.0
    actual = transformers_logits(tmp_path / "out", cls)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32_LOGITS)
    before, after = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("base", "out")
    )
    assert after["architectures"] == [cls.__name__]
    assert after["eos_token_id"] == before["eos_token_id"]


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        ("llama", LORA),
        ("mistral", {**LORA, "rslora": True, "target_modules": ["q_proj", "up_proj"]}),
        ("qwen2", {**LORA, "dora": True}),
        # k_proj and up_proj are stored fused with projections that are not adapted.
        ("phi3", {**LORA, "dora": True, "target_modules": ["k_proj", "up_proj", "o_proj"]}),
        ("gemma2", LORA),
    ],
)
def test_lora_merged_into_the_weights(tmp_path, model_type, method):
    base = saved_base(tmp_path / "base", model_type)
    adapter = adapter_of(base, method)
    assert moe_jax.export_adapter(adapter, "llama", tmp_path / "out") == NOTES
    expected = moe_jax_logits(base, adapter)
    assert np.abs(expected - moe_jax_logits(base)).max() > 0.5
    actual = transformers_logits(tmp_path / "out")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32_LOGITS)
    assert moe_jax.load_base(tmp_path / "out").config == base.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_of_the_base_is_the_default(tmp_path, dtype):
    model = tiny_model("llama").to(getattr(torch, dtype))
    model.model.norm.to(torch.float32)  # less than half of the bytes
    model.save_pretrained(tmp_path / "base")
    assert len({tensor.dtype for tensor in tensors_of(tmp_path / "base").values()}) == (
        1 if dtype == "float32" else 2
    )
    adapter = adapter_of(moe_jax.load_base(tmp_path / "base"), LORA)
    said = []
    moe_jax.export_adapter(adapter, "llama", tmp_path / "out", say=said.append)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {model.dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert f" in {dtype}, written by" in (tmp_path / "out" / "README.md").read_text()
    (line,) = said
    size = float(
        line.removeprefix(f"writing {tmp_path / 'out'}: llama, {dtype}, up to ").split()[0]
    )
    actual = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert actual <= size * 1e6 + 5e4 < actual + 3e5  # room for headers and the card, not twice


def test_a_rounded_export_is_as_close_as_its_rounding_allows(tmp_path):
    """The change of a logit against the bound of Hoeffding's inequality on rounding errors.

    Rounding a weight w to bfloat16, eight bits, changes it by at most 2^-9 |w|. Errors of different
    weights are independent, so that a logit with the gradient g changes by more than six times
    2^-9 |g w|, summed in squares, in one of 3e7 cases.
    """
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = moe_jax.load_base(tmp_path / "base")
    adapter = adapter_of(base, LORA)
    moe_jax.export_adapter(adapter, "llama", tmp_path / "out")
    moe_jax.export_adapter(adapter, "llama", tmp_path / "exact", dtype="float32")
    actual, expected = transformers_logits(tmp_path / "out"), moe_jax_logits(base, adapter)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", dtype=torch.float32).eval()
    logits = model(torch.tensor(TOKENS)).logits
    changes = np.abs(actual - expected)
    for index in np.argsort(changes, axis=None)[:: -changes.size // 20]:
        place = np.unravel_index(index, changes.shape)
        model.zero_grad()
        logits[tuple(map(int, place))].backward(retain_graph=True)
        squares = sum(float(((p.grad * p) ** 2).sum()) for p in model.parameters())
        assert changes[place] <= 6 * 2**-9 * squares**0.5 + FLOAT32_LOGITS
    assert changes.max() > FLOAT32_LOGITS, "they were rounded"


@pytest.mark.parametrize(("to", "method"), [("mixtral", MIXLORA), ("llama", LORA)])
def test_bfloat16_rounds_merged_weights_once(tmp_path, to, method):
    model = tiny_model("llama")
    model.lm_head.weight.data *= 0.1  # logits below one, for which the tolerance holds
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = moe_jax.load_base(tmp_path / "base")
    adapter = adapter_of(base, method)
    for dtype in ("float32", "bfloat16"):
        moe_jax.export_adapter(adapter, to, tmp_path / dtype, dtype=dtype)
    exact, rounded = tensors_of(tmp_path / "float32"), tensors_of(tmp_path / "bfloat16")
    assert exact.keys() == rounded.keys()
    for name, tensor in exact.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.to(torch.bfloat16), rounded[name]), name
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = moe_jax_logits(base, adapter)
    assert np.abs(expected - moe_jax_logits(base)).max() > 10 * BFLOAT16_TENSORS
    actual = transformers_logits(tmp_path / "bfloat16")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=BFLOAT16_TENSORS)


def test_tensors_beside_the_base_are_left_out_and_named(tmp_path):
    saved_base(tmp_path / "base", "llama")
    file = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(file), "v_head.weight": torch.ones(3)}, file, {"format": "pt"})
    base = moe_jax.load_base(tmp_path / "base")
    adapter = adapter_of(base, LORA)
    notes = moe_jax.export_adapter(adapter, "llama", tmp_path / "out")
    note = f"not read from {tmp_path / 'base'}, as no part of the model: v_head.weight"
    assert notes == [*NOTES, note]
    actual = transformers_logits(tmp_path / "out")
    np.testing.assert_allclose(actual, moe_jax_logits(base, adapter), rtol=0, atol=FLOAT32_LOGITS)


def test_several_shards_and_copied_files(tmp_path, monkeypatch):
    base = saved_base(tmp_path / "base", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        (tmp_path / "base" / name).write_text(f'{{"from": "{name}"}}')
    (tmp_path / "base" / "optimizer.pt").write_text("x")
    adapter = adapter_of(base, MIXLORA)
    assert moe_jax.export_adapter(adapter, "mixtral", tmp_path / "one") == []
    whole = tensors_of(tmp_path / "one")
    monkeypatch.setattr(whole_model, "MAX_SHARD_BYTES", 20_000)
    moe_jax.export_adapter(adapter, "mixtral", tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    weight_map = {}
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000
        weight_map |= dict.fromkeys(tensors, file)
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, whole[name]), name
    assert np.array_equal(
        transformers_logits(tmp_path / "out"), transformers_logits(tmp_path / "one")
    )
    beside = {f.name for f in (tmp_path / "out").iterdir() if f.suffix != ".safetensors"}
    assert beside == {
        "README.md",
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out" / "LICENSE").read_text() == '{"from": "LICENSE"}'


def test_the_card_of_a_whole_model(tmp_path):
    base = saved_base(tmp_path / "base", "llama")
    adapter = adapter_of(base, {**MIXLORA, "losses": {"router_z": {"coefficient": 0.003}}})
    moe_jax.export_adapter(adapter, "mixtral", tmp_path / "out", dtype="bfloat16")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "This is a `MixtralForCausalLM` in bfloat16",
        "trained on it for 7 steps. It is equivalent to the adapter on its base",
        f"`{tmp_path / 'base'}`, fingerprint `{base.identity.fingerprint}`",
        "| router.top_k | `2` |",
        "| losses.router_z.coefficient | `0.003` |",
        "| rank | `4` |",
    ):
        assert words in card
    assert "KL" not in card
    assert "base_model:" not in card  # only bases on the hub have this field


def test_memory_of_an_export_is_a_few_matrices(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
    base = saved_base(tmp_path / "base", "llama", **sizes)
    adapter = adapter_of(base, {**MIXLORA, "num_experts": 8})
    matrix = 4 * 128 * 512
    threshold = gc.get_threshold()
    gc.set_threshold(700, *threshold[1:])  # Python's default; the tests collect less often
    tracemalloc.start()
    try:
        moe_jax.export_adapter(adapter, "mixtral", tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.set_threshold(*threshold)
    # A layer has 24 matrices and attention. The rest is files, traces and headers.
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 48 * matrix
    assert peak < 8 * matrix
