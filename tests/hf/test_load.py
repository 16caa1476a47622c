"""Loaded parameters equal the state dict of the saved torch model, leaf by leaf."""

import codecs
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moe_jax.errors import CheckpointError
from moe_jax.hf import load as base
from moe_jax.hf.base_model import open_base
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import abstract_base_params, load_base_params

VARIANTS = {
    "untied": {},
    "tied": dict(tie_word_embeddings=True),
    "biased": dict(attention_bias=True, mlp_bias=True),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "gqa_odd_head": dict(head_dim=10, num_key_value_heads=2),
    "one_layer": dict(num_hidden_layers=1, num_key_value_heads=1),
}
TORCH_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def save_llama(folder, shard_size="50GB", dtype="float32", **changes) -> dict[str, torch.Tensor]:
    """Saves a tiny Llama with all leaves random, also norms and biases, and returns its state."""
    torch.manual_seed(0)
    fields = dict(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(LlamaConfig(**fields | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model = model.to(TORCH_TYPES[dtype])
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model.state_dict()


def expected_tree(state: dict[str, torch.Tensor], config, dtype: str) -> dict:
    """Parameter tree assembled by hand from torch's names."""

    def get(name: str) -> np.ndarray:
        value = state[name].to(TORCH_TYPES[dtype])
        array = value.float().numpy().astype(jnp.dtype(dtype))  # exact: no wider than float32
        return array.T if name.endswith("_proj.weight") or name == "lm_head.weight" else array

    def stacked(name: str) -> np.ndarray:
        return np.stack([get(f"model.layers.{i}.{name}") for i in range(config.num_layers)])

    def projection(name: str, bias: bool) -> dict:
        leaves = {"kernel": stacked(f"{name}.weight")}
        return leaves | ({"bias": stacked(f"{name}.bias")} if bias else {})

    tree = {
        "embed_tokens": {"embedding": get("model.embed_tokens.weight")},
        "layers": {
            "input_layernorm": {"scale": stacked("input_layernorm.weight")},
            "self_attn": {
                name: projection(f"self_attn.{name}", config.attention_bias)
                for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            },
            "post_attention_layernorm": {"scale": stacked("post_attention_layernorm.weight")},
            "mlp": {
                name: projection(f"mlp.{name}", config.mlp_bias)
                for name in ("gate_proj", "up_proj", "down_proj")
            },
        },
        "norm": {"scale": get("model.norm.weight")},
    }
    if not config.tie_word_embeddings:
        tree["lm_head"] = {"kernel": get("lm_head.weight")}
    return tree


def assert_equal(actual, expected) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == e.dtype, path
        np.testing.assert_array_equal(np.asarray(a), e, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("shard_size", ["50GB", "40KB", "12KB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_leaves_equal_the_torch_model(variant: str, shard_size: str, tmp_path):
    state = save_llama(tmp_path, shard_size, **VARIANTS[variant])
    assert (shard_size == "50GB") == (tmp_path / "model.safetensors").exists()
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    assert_equal(params, expected_tree(state, config, "float32"))


@pytest.mark.parametrize("dtype", TORCH_TYPES)
@pytest.mark.parametrize("stored", TORCH_TYPES)
def test_types_are_converted_as_torch_does(stored: str, dtype: str, tmp_path):
    state = save_llama(tmp_path, dtype=stored)
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, dtype)
    assert_equal(params, expected_tree(state, config, dtype))


def test_tensor_read_in_several_blocks(tmp_path, monkeypatch):
    state = save_llama(tmp_path, dtype="bfloat16")
    config = read_model_config(tmp_path)
    monkeypatch.setattr("moe_jax.hf.load._BLOCK_BYTES", 1000)  # about 10 rows of 48
    assert_equal(
        load_base_params(tmp_path, config, "float32"), expected_tree(state, config, "float32")
    )


def test_abstract_tree_has_the_loaded_shapes(tmp_path):
    save_llama(tmp_path, attention_bias=True, tie_word_embeddings=True)
    config = read_model_config(tmp_path)
    actual = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        load_base_params(tmp_path, config, "bfloat16"),
    )
    assert actual == abstract_base_params(config, "bfloat16")


MESHES = {
    "all_on_one_axis": ((8, 1), lambda ndim: PartitionSpec(*[None] * (ndim - 1), "a")),
    "both_axes": ((2, 4), lambda ndim: PartitionSpec(*[None] * (ndim - 2), *("a", "b")[-ndim:])),
    "input_axis": ((2, 4), lambda ndim: PartitionSpec(None, "b") if ndim > 1 else PartitionSpec()),
    "replicated": ((8, 1), lambda ndim: PartitionSpec()),
    "partly_replicated": ((4, 2), lambda ndim: PartitionSpec(*[None] * (ndim - 1), "b")),
}


@pytest.mark.parametrize("name", MESHES)
def test_sharded_equals_whole(name: str, tmp_path, devices):
    state = save_llama(tmp_path, "12KB", attention_bias=True, num_hidden_layers=2)
    config = read_model_config(tmp_path)
    sizes, spec = MESHES[name]
    mesh = jax.make_mesh(sizes, ("a", "b"), (AxisType.Auto,) * 2, devices=devices)
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(len(leaf.shape))),
        abstract_base_params(config, "float32"),
    )
    params = load_base_params(tmp_path, config, "float32", shardings)
    assert_equal(params, expected_tree(state, config, "float32"))
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings


def test_layers_can_be_sharded(tmp_path, devices):
    state = save_llama(tmp_path, num_hidden_layers=8)
    config = read_model_config(tmp_path)
    mesh = jax.make_mesh((8,), ("a",), (AxisType.Auto,), devices=devices)
    spec = {"layers": PartitionSpec("a")}
    shardings = {
        part: jax.tree.map(lambda _: NamedSharding(mesh, spec.get(part, PartitionSpec())), tree)  # noqa: B023
        for part, tree in abstract_base_params(config, "float32").items()
    }
    params = load_base_params(tmp_path, config, "float32", shardings)
    assert_equal(params, expected_tree(state, config, "float32"))


def test_a_device_reads_only_its_part(tmp_path, devices, monkeypatch):
    save_llama(tmp_path)
    config = read_model_config(tmp_path)
    mesh = jax.make_mesh((8,), ("a",), (AxisType.Auto,), devices=devices)
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (len(leaf.shape) - 1), "a")),
        abstract_base_params(config, "float32"),
    )
    sizes = []

    def read(*args):
        part = original(*args)
        sizes.append(part.size)
        return part

    original = base._read_part
    monkeypatch.setattr(base, "_read_part", read)
    params = load_base_params(tmp_path, config, "float32", shardings)
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert max(sizes) == max(leaf.size for leaf in jax.tree.leaves(params)) // 8


ATTENTION = "model.layers.0.self_attn."
OTHERS = {
    name: np.ones(6, np.float32) for name in ("v_head.summary.weight", "score.weight", "mtp.norm.w")
}
BUFFERS = {
    name: np.ones(6, np.float32)
    for name in (
        "rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        f"{ATTENTION}rotary_emb.inv_freq",
        f"{ATTENTION}rotary_emb.cos_cached",
    )
}


@pytest.mark.parametrize(
    ("change", "fields", "unread"),
    [
        pytest.param(lambda t: t | BUFFERS, {}, [], id="rotary_buffers"),
        pytest.param(lambda t: t | OTHERS, {}, sorted(OTHERS), id="other_heads"),
        pytest.param(lambda t: t | {"model.extra": OTHERS["mtp.norm.w"]}, {}, ["model.extra"]),
        pytest.param(
            lambda t: t,
            {"num_hidden_layers": 2},
            "layers.2 (9 tensors)",
            id="layers_beyond_the_last",
        ),
        pytest.param(
            lambda t: {k.removeprefix("model."): v for k, v in t.items()},
            {},
            [],
            id="decoder_alone",
        ),
        pytest.param(lambda t: {f"model.{k}": v for k, v in t.items()}, {}, [], id="prefix_twice"),
        pytest.param(
            lambda t: {k.replace("model.layers.1", "layers.1"): v for k, v in t.items()},
            {},
            [],
            id="both_kinds_of_names",
        ),
        pytest.param(
            lambda t: {k: v.astype(np.float64) for k, v in t.items()}, {}, [], id="float64"
        ),
    ],
)
def test_what_transformers_loads_is_loaded_and_the_rest_named(tmp_path, change, fields, unread):
    save_llama(tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    change_config(tmp_path, **fields)
    model, info = LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    base_model = open_base(tmp_path)
    params = load_base_params(tmp_path, base_model.config, "float32")
    assert_equal(params, expected_tree(model.state_dict(), base_model.config, "float32"))
    if isinstance(unread, list):
        assert list(base_model.unread) == unread
        unread = ", ".join(unread)
    buffers = {name for name in info["unexpected_keys"] if "rotary_emb" in name}
    assert set(base_model.unread) == info["unexpected_keys"] - buffers
    if unread:
        assert base_model.unread_note.endswith(f"as no part of the model: {unread}")
    else:
        assert base_model.unread_note is None


@pytest.mark.parametrize("form", ["./{name}", "weights/{name}", "{folder}/{name}"])
def test_files_that_an_index_names_by_path(tmp_path, form):
    state = save_llama(tmp_path, shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = {
        name: form.format(name=name, folder=tmp_path) for name in content["weight_map"].values()
    }
    (tmp_path / "weights").mkdir()
    for name, path in names.items():
        (tmp_path / name).rename(tmp_path / path)
    content["weight_map"] = {key: names[name] for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    assert len(names) > 1
    config = read_model_config(tmp_path)
    params = load_base_params(tmp_path, config, "float32")
    assert_equal(params, expected_tree(state, config, "float32"))
    _, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


def change_config(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("lists_head", [True, False])
def test_index_of_another_save_of_a_tied_model(tmp_path, lists_head: bool):
    """The index was copied from a save with a head, or from one without."""
    state = save_llama(tmp_path, "40KB", tie_word_embeddings=True)
    last = max(tmp_path.glob("model-*.safetensors"))
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    if lists_head:
        index["weight_map"]["lm_head.weight"] = last.name
    else:
        head = {"lm_head.weight": state["model.embed_tokens.weight"].numpy()}
        save_file(load_file(last) | head, last)
        first = min(tmp_path.glob("model-*.safetensors"))  # the same tensor in two files
        save_file(load_file(first) | head, first)
    file.write_text(json.dumps(index))
    model, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    config = read_model_config(tmp_path)
    expected = expected_tree(model.state_dict(), config, "float32")
    assert_equal(load_base_params(tmp_path, config, "float32"), expected)


def test_safetensors_take_precedence_over_a_pickle(tmp_path):
    state = save_llama(tmp_path)
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save(other, tmp_path / "pytorch_model.bin")
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    expected = expected_tree(model.state_dict(), config, "float32")
    assert np.any(expected["norm"]["scale"])
    assert_equal(load_base_params(tmp_path, config, "float32"), expected)


def test_byte_order_marks(tmp_path):
    state = save_llama(tmp_path, "40KB")
    for name in ("config.json", "model.safetensors.index.json", "generation_config.json"):
        file = tmp_path / name
        file.write_text(file.read_text(), encoding="utf-8-sig")
        assert file.read_bytes().startswith(codecs.BOM_UTF8)
    config = read_model_config(tmp_path)
    expected = expected_tree(state, config, "float32")
    assert_equal(load_base_params(tmp_path, config, "float32"), expected)


def test_stored_tied_head_that_equals_the_embedding(tmp_path):
    state = save_llama(tmp_path, tie_word_embeddings=True)
    config = read_model_config(tmp_path)
    expected = expected_tree(state, config, "float32")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    both = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    save_file(both, tmp_path / "model.safetensors")
    assert_equal(load_base_params(tmp_path, config, "float32"), expected)
    del both["model.embed_tokens.weight"]
    save_file(both, tmp_path / "model.safetensors")
    assert_equal(load_base_params(tmp_path, config, "float32"), expected)


def test_bfloat16_beyond_float16_is_refused(tmp_path):
    save_llama(tmp_path, dtype="bfloat16")
    config = read_model_config(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = ml_dtypes.bfloat16(1e5)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*float16"):
        load_base_params(tmp_path, config, "float16")
    load_base_params(tmp_path, config, "float32")


def test_float64_beyond_float32_is_refused(tmp_path):
    save_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64) * 1e300
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*float32 cannot hold"):
        load_base_params(tmp_path, read_model_config(tmp_path), "float32")
