"""Refusals of whole-model exports and of options, and cleanup after failed writes."""

import dataclasses
import errno
import re
import shutil
from types import SimpleNamespace

import jax
import pytest
from foreign_adapters import LORA, LORAMOE, MIXLORA, SWITCH, TOP_P, random_adapter
from whole_models import adapter_of

import moe_jax
from moe_jax.adapters import METHODS
from moe_jax.adapters.routing import TopKRouter
from moe_jax.exchange import dense, mixtral, whole_model
from moe_jax.exchange.format import field_names


def refusal(*arguments, **keywords):
    with pytest.raises(moe_jax.UserError) as error:
        moe_jax.export_adapter(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("to", "method", "changes", "words"),
    [
        ("mixtral", LORA, {}, "cannot express method 'lora'; its experts are FFNs behind"),
        (
            "mixtral",
            LORA,
            {},
            "as in MixLoRA; formats that can: --to llama, --to mixlora, --to peft",
        ),
        ("mixtral", LORAMOE, {}, "as in MixLoRA; formats that can: --to mixlora"),
        ("mixtral", {**LORAMOE, "dora": True}, {}, "as in MixLoRA; formats that can: --to moe_jax"),
        (
            "mixtral",
            {**MIXLORA, "router": TOP_P},
            {},
            "router 'top_p'; it supports top_k only; format",
        ),
        ("mixtral", MIXLORA, {"model_type": "gemma2"}, "a base of type 'gemma2'; only llama, mis"),
        ("mixtral", MIXLORA, {"mlp_bias": True}, "a base with mlp_bias; its experts have no bias"),
        ("mixtral", MIXLORA, {"attention_bias": True}, "a base with attention_bias; Mixtral has"),
        (
            "mixtral",
            MIXLORA,
            {
                "model_type": "qwen3",
                "sliding_window": 4,
                "layer_types": ("full_attention", "sliding_attention", "full_attention"),
            },
            "layer_types that differ; all its layers are of one type",
        ),
        (
            "llama",
            LORAMOE,
            {},
            "method 'loramoe'; its experts are single projections with a rou",
        ),
        (
            "mixtral",
            {**MIXLORA, "dora": True},
            {"mlp_bias": True},
            "no biases; formats that can: --to llama",
        ),
        (
            "llama",
            {**MIXLORA, "router": SWITCH},
            {},
            "router 'switch'; the FFN's output is not a",
        ),
        (
            "llama",
            MIXLORA,
            {},
            "data: merging experts is approximate, and the divergence has to",
        ),
        ("llama", {**MIXLORA, "router": TOP_P}, {}, "be measured; give a text file"),
    ],
)
def test_adapters_that_cannot_be_one_model(tiny, tmp_path, to, method, changes, words):
    model = dataclasses.replace(tiny.base.config, **changes)
    message = refusal(random_adapter(method, model, str(tiny.folder)), to, tmp_path / "out")
    assert words in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "method", "advised"),
    [
        ("mixlora", {**MIXLORA, "dora": True}, ["llama", "mixtral"]),
        ("mixlora", {**LORA, "dora": True}, ["llama", "peft"]),
        ("peft", MIXLORA, ["llama", "mixlora", "mixtral"]),
        ("mixlora", {**LORAMOE, "dora": True}, ["moe_jax"]),
    ],
)
def test_advised_formats_accept_the_adapter(mixture, tmp_path, to, method, advised):
    base, _, _, _ = mixture
    adapter = adapter_of(base, method)
    message = refusal(adapter, to, tmp_path / "out")
    assert re.findall(r"--to (\w+)", message) == advised
    for name in advised:
        if name != "llama" or method["name"] == "lora":  # llama with experts needs a text
            moe_jax.export_adapter(adapter, name, tmp_path / name)


def test_options_that_do_not_apply(tiny, mixture, tmp_path):
    base, adapter, text, _ = mixture
    lora, out = adapter_of(base, LORA), tmp_path / "out"
    assert "weights: a LoRA has no experts" in refusal(lora, "llama", out, weights="average")
    assert "unknown weights 'mean'" in refusal(adapter, "llama", out, weights="mean", data=text)
    for to in ("mixtral", "mixlora"):
        assert f"weights: the {to} format does not merge" in refusal(
            adapter, to, out, weights="average"
        )
        assert f"data: the {to} format does not merge" in refusal(adapter, to, out, data=text)
    assert "holds no tokenizer" in refusal(adapter, "llama", out, base=str(tiny.folder), data=text)
    (tmp_path / "rows.jsonl").write_text('{"words": "w1"}\n')
    message = refusal(adapter, "llama", out, data=tmp_path / "rows.jsonl")
    assert "rows.jsonl: line 1: the columns words fit no schema" in message
    (tmp_path / "rows.pdf").write_text("words")
    message = refusal(adapter, "llama", out, data=tmp_path / "rows.pdf")
    assert "rows.pdf: unknown kind of file; known: .json, " in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.pdf"]


@pytest.mark.parametrize(("to", "method"), [("mixtral", MIXLORA), ("llama", LORA)])
def test_failed_writes_leave_nothing(tiny, mixture, tmp_path, monkeypatch, to, method):
    base, _, _, _ = mixture
    adapter, out = adapter_of(base, method), tmp_path / "out"
    message = refusal(adapter, to, out, base=str(tiny.folder))
    assert "the adapter: was trained on the base" in message
    large = adapter._replace(tree=jax.tree.map(lambda leaf: leaf * 1e4, adapter.tree))
    message = refusal(large, to, out, dtype="float16")
    assert "has values that are not finite in float16; use another dtype" in message
    broken = adapter._replace(tree={"layers": {"mlp": adapter.tree["layers"]["mlp"]}})
    assert "has no array for 'layers/self_attn/" in refusal(broken, to, out)

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(whole_model, "_write_tensor", full)
    assert "no space left on the disk; free some space" in refusal(adapter, to, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    assert " and the disk has 0.1 MB; free some space" in refusal(adapter, to, out)
    assert list(tmp_path.iterdir()) == []


def test_every_field_is_handled():
    """Every field is in the lists of fields that the formats handle."""
    assert set(field_names(METHODS["mixlora"])) == set(mixtral._KNOWN)
    assert set(field_names(METHODS["mixlora"])) == set(dense._KNOWN_OF_MIXLORA)
    assert set(field_names(METHODS["lora"])) == set(dense._KNOWN_OF_LORA)
    assert set(field_names(TopKRouter)) == set(mixtral._HANDLED_ROUTER_FIELDS)
