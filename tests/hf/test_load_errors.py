"""Invalid checkpoints are refused in one line that names the file or tensor, before any reading."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file as save_torch_file
from transformers import LlamaConfig, LlamaForCausalLM

from moe_jax.errors import CheckpointError
from moe_jax.hf.base_model import open_base
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params

INDEX = "model.safetensors.index.json"
FIELDS = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """One model, saved in one file and in several."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**FIELDS))
    folders = {name: tmp_path_factory.mktemp(name) for name in ("single", "sharded")}
    model.save_pretrained(folders["single"])
    model.save_pretrained(folders["sharded"], max_shard_size="12KB")
    return folders


@pytest.fixture
def single(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved["single"], tmp_path / "single"))


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved["sharded"], tmp_path / "sharded"))


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch):
    """Fails a test that reads a tensor: all errors here are detected from the headers."""

    def read(*args):
        raise AssertionError("a tensor was read before everything was checked")

    monkeypatch.setattr("moe_jax.hf.load._read_part", read)


def refused(folder: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_base_params(folder, read_model_config(folder), "float32")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(folder))
    return text


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_missing_tensors(single):
    change_tensors(single, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(single, r"lack model\.layers\.1\.mlp\.up_proj\.weight;")
    change_config(single, num_hidden_layers=4)
    refused(single, r"lack .* and \d+ more;")


def test_unexpected_tensors(single):
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(single, lambda t: t.update({name: np.zeros(32, np.float32)}))
    refused(single, r"hold .*q_proj\.bias, .*\(config\.json says attention_bias false\)")


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_norm.weight", "lm_head.bias", "model.norm.bias"]
)
def test_unknown_tensors_of_modules_that_are_computed(single, name: str):
    change_tensors(single, lambda t: t.update({name: np.zeros(8, np.float32)}))
    refused(single, rf"hold {name}, .*\(a model of type 'llama' has no such weights\)")


def test_two_names_of_one_tensor(single):
    change_tensors(single, lambda t: t.update({"norm.weight": t["model.norm.weight"] + 1}))
    refused(single, r"hold model\.norm\.weight under several names, model.* and norm\.weight")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_of_a_wrapped_model(single, prefix: str):
    tensors = load_file(single / "model.safetensors")
    save_file({prefix + k: v for k, v in tensors.items()}, single / "model.safetensors")
    refused(single, rf"lack .* more; they are stored with the prefix '{prefix}' of a wrapper")


def test_decoder_saved_without_its_head(single):
    change_tensors(single, lambda t: t.pop("lm_head.weight"))
    refused(single, r"lack lm_head\.weight; the decoder was saved without its language-modeling")


def test_missing_biases(single):
    change_config(single, attention_bias=True)
    refused(single, r"lack model\.layers\.0\.self_attn\.q_proj\.bias")


def test_shapes(single):
    change_config(single, num_key_value_heads=4)
    refused(
        single,
        r"model\.safetensors: model\.layers\.0\.self_attn\.k_proj\.weight: has shape \[16, 32\], "
        r"but by config\.json it should have \[32, 32\]",
    )


def test_types(single):
    name = "model.norm.weight"
    change_tensors(single, lambda t: t.update({name: t[name].astype(np.int32)}))
    refused(single, r"model\.norm\.weight: is stored as I32; supported: F32, F16, BF16, F64")


def test_tied_head_of_another_value(single):
    change_config(single, tie_word_embeddings=True)
    refused(single, r"lm_head\.weight: differs from model\.embed_tokens\.weight")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_file(single, kept: int):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(single, r"model\.safetensors: truncated or damaged")


def test_truncated_shard(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-100])
    assert path.name in refused(sharded, r"truncated or damaged")


def test_git_lfs_pointer(single):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    (single / "model.safetensors").write_text(pointer)
    refused(single, r"Git LFS pointer.*git lfs pull")


def test_weights_that_are_a_link_to_nothing(single):
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to("../../blobs/1")
    refused(single, r"model\.safetensors: is a link to \.\./\.\./blobs/1, which does not exist")


def test_types_that_numpy_lacks(single):
    file, name = single / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_torch_file(file)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_torch_file(tensors, file)
    refused(single, rf"{name}: is stored as F8_E4M3, which is not supported")
    with pytest.raises(CheckpointError, match=name):
        open_base(single)


def test_missing_shard(sharded):
    path = sorted(sharded.glob("model-*.safetensors"))[1]
    path.unlink()
    assert path.name in refused(sharded, r"lists .* which the folder lacks")


def test_two_files_that_differ_in_a_tensor(sharded):
    first, second, *_ = sorted(sharded.glob("model-*.safetensors"))
    tensors = load_file(first)
    key = min(tensors)
    save_file(load_file(second) | {key: tensors[key] + 1}, second)
    refused(sharded, rf"{key} has other values in {first.name} than in {second.name}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": {', r"not valid JSON"),
        ("[]", r"expected an object, got list"),
        ('{"weight_map": {}}', r"has no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', r"weight_map\.a: .* is outside the folder"),
        ('{"weight_map": {"a": 1}}', r"weight_map\.a: 1 is not a file name"),
    ],
)
def test_malformed_index(sharded, content: str, message: str):
    (sharded / INDEX).write_text(content)
    refused(sharded, message)


def test_shards_without_index(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, r"neither model\.safetensors nor model\.safetensors\.index\.json")


def test_no_weights(single):
    (single / "model.safetensors").unlink()
    refused(single, r"has no model\.safetensors .*pytorch_model\.bin, convert it: python -c")


def test_adapter_instead_of_base(single):
    (single / "model.safetensors").rename(single / "adapter_model.safetensors")
    refused(single, r"holds an adapter, not a base model")


def test_the_command_for_legacy_weights_works(single, monkeypatch):
    monkeypatch.undo()  # the converted checkpoint is read
    config = read_model_config(single)
    expected = load_base_params(single, config, "float32")
    model = LlamaForCausalLM.from_pretrained(single)
    torch.save(model.state_dict(), single / "pytorch_model.bin")
    (single / "model.safetensors").unlink()
    save_tokenizer(single)
    text = refused(single, r"pytorch_model\.bin only.*convert it: python -c")
    command = shlex.split(text.split("convert it: ")[1].split(" (needs torch)")[0])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    converted = Path(text.rsplit("then give ", 1)[1])
    actual = load_base_params(converted, read_model_config(converted), "float32")
    assert read_model_config(converted) == config
    np.testing.assert_array_equal(
        actual["layers"]["mlp"]["down_proj"]["kernel"],
        expected["layers"]["mlp"]["down_proj"]["kernel"],
    )


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)
