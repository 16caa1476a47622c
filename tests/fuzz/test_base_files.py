"""Files of a base model: `config.json`, its index and weights, generation settings, tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzz.inputs import as_json, attempt, damaged, fuzz, json_texts, mutated
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.demo.tiny_llama import write_checkpoint
from moe_jax.errors import UserError
from moe_jax.hf.base_model import open_base
from moe_jax.hf.config import model_config_from_hf
from moe_jax.hf.families import FAMILIES
from moe_jax.hf.load import checked_leaves
from moe_jax.hf.shards import open_shards
from moe_jax.inference.stopping import end_tokens

TOKENIZER = Path("moe_jax/demo/base")
_SIZES = {
    "vocab_size": 40,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
# Of the dense variant, and of layers that it does not have but that must fit its width.
_GRANITE_4 = {
    "layer_types": ["full_attention"] * 2,
    "num_local_experts": 0,
    "shared_intermediate_size": 12,
    "mamba_n_heads": 2,
}
_ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}


def _family_configs() -> list[dict[str, Any]]:
    configs = []
    for model_type, family in FAMILIES.items():
        own = _GRANITE_4 if model_type == "granitemoehybrid" else {}
        fields = json.loads(AutoConfig.for_model(model_type, **_SIZES, **own).to_json_string())
        configs.append({**fields, "architectures": [family.architecture]})
    llama = next(c for c in configs if c["model_type"] == "llama")
    wrapper = {"model_type": "llava", "architectures": ["x"], "text_config": llama}
    return [*configs, wrapper, {**llama, "rope_parameters": None, "rope_scaling": _ROPE}]


CONFIGS = _family_configs()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_checkpoint(folder, seed=0, shards=2, **_SIZES, max_position_embeddings=16)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


@fuzz(quick=200, share=0.24)
@given(st.sampled_from(CONFIGS).flatmap(mutated))
def test_architectures(fields: Any):
    with attempt("config.json"):
        if isinstance(fields, dict):
            model_config_from_hf(fields, "config.json")


def _names(base: Path) -> list[str]:
    return sorted(file.name for file in base.iterdir())


@fuzz(quick=100, share=0.05)
@given(data=st.data())
def test_files_of_a_base(base: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.getbasetemp() / "fuzz_base"
    shutil.copytree(base, folder, dirs_exist_ok=True)
    name = data.draw(
        st.sampled_from([name for name in _names(base) if not name.startswith("tokenizer")])
    )
    content = (base / name).read_bytes()
    texts = json_texts(json.loads(content)) if name.endswith(".json") else damaged(content)
    (folder / name).write_bytes(data.draw(texts))

    with attempt("files of a base"):
        opened = open_base(folder)
        with open_shards(folder) as shards:
            checked_leaves(shards, opened.config)
        end_tokens(folder, load_tokenizer_once())


_LOADED: list[Any] = []


def load_tokenizer_once() -> Any:
    """The demo's tokenizer."""
    if not _LOADED:
        _LOADED.append(load_tokenizer(TOKENIZER))
    return _LOADED[0]


@fuzz(quick=6, share=0.004)
@given(data=st.data())
def test_tokenizers(base: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    folder = tmp_path_factory.getbasetemp() / "fuzz_tokenizer"
    shutil.copytree(base, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    content = (TOKENIZER / name).read_bytes()
    (folder / name).write_bytes(data.draw(json_texts(json.loads(content)) | damaged(content)))

    with attempt("tokenizers"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": 3},
        {"architectures": [[3]]},
        {"model_type": ["llama"]},
        {"rms_norm_eps": float("nan")},
        {"hidden_size": [8]},
        {"rope_scaling": {"rope_type": ["yarn"]}, "rope_parameters": None},
        {"hidden_size": "@deep@"},
        {"hidden_size": "@digits@"},
    ],
    ids=str,
)
def test_fields_of_other_types(base: Path, tmp_path: Path, fields: dict[str, Any]):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    file = folder / "config.json"
    file.write_text(as_json({**json.loads(file.read_text()), **fields}))

    with pytest.raises(UserError, match=r"config\.json"):
        open_base(folder)
