"""Adapters: our own folders, and those of PEFT with safetensors or a pickle."""

import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from foreign_adapters import LORA, MIXLORA, random_adapter
from fuzz.inputs import attempt, damaged, folder_with, fuzz, json_texts
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.checkpoints.adapter_files import (
    described_method,
    load_adapter,
    read_description,
    save_adapter,
)
from moe_jax.checkpoints.training_record import read_record
from moe_jax.demo.tiny_llama import write_checkpoint
from moe_jax.exchange.api import export_adapter, import_adapter
from moe_jax.exchange.torch_files import read_torch_file, write_torch_file
from moe_jax.hf.base_model import BaseModel, open_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    write_checkpoint(folder, seed=0, **sizes, **heads)
    return open_base(folder)


@pytest.fixture(scope="module")
def adapter(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(folder, random_adapter(MIXLORA, base.config)._replace(base=base.identity))
    return folder


@pytest.fixture(scope="module", params=["adapter_model.safetensors", "adapter_model.bin"])
def foreign(request: pytest.FixtureRequest, base: BaseModel, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "peft"
    adapter = random_adapter(LORA, base.config)._replace(base=base.identity)
    export_adapter(adapter, "peft", folder, base=str(base.folder))
    if request.param.endswith(".bin"):
        from safetensors.numpy import load_file

        tensors = load_file(folder / "adapter_model.safetensors")
        write_torch_file(folder / request.param, tensors)
        (folder / "adapter_model.safetensors").unlink()
    return folder


@fuzz(quick=60, share=0.06)
@given(data=st.data())
def test_descriptions(adapter: Path, data: st.DataObject, tmp_path_factory: Any):
    text = data.draw(json_texts(json.loads((adapter / "adapter.json").read_text())))
    folder = folder_with(tmp_path_factory, "adapter.json", text)
    with attempt("adapter.json"):
        described_method(folder, read_description(folder))


_RECORD = json.loads(Path("tests/data/adapter_format/training_record_5.json").read_text())


@fuzz(quick=40, share=0.04)
@given(json_texts(_RECORD))
def test_training_records(tmp_path_factory: pytest.TempPathFactory, text: bytes):
    folder = folder_with(tmp_path_factory, "training.json", text)
    with attempt("training.json"):
        read_record(folder)


@fuzz(quick=8, share=0.004)
@given(data=st.data())
def test_weights(adapter: Path, data: st.DataObject, tmp_path_factory: Any):
    expected = load_adapter(adapter)
    folder = tmp_path_factory.getbasetemp() / "fuzz_weights"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(adapter, folder)
    files = sorted(file for file in (folder / "weights").rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    file.write_bytes(data.draw(damaged(file.read_bytes())))

    with attempt("weights of adapters"):
        loaded = load_adapter(folder)

        jax.tree.map(np.testing.assert_array_equal, loaded.tree, expected.tree)


@fuzz(quick=40, share=0.04)
@given(data=st.data())
def test_foreign_adapters(
    base: BaseModel, foreign: Path, data: st.DataObject, tmp_path_factory: Any
):
    folder = tmp_path_factory.getbasetemp() / f"fuzz_{foreign.parent.name}"
    shutil.copytree(foreign, folder, dirs_exist_ok=True)
    file = folder / data.draw(
        st.sampled_from([f.name for f in sorted(foreign.iterdir()) if f.suffix != ".md"])
    )
    content = (foreign / file.name).read_bytes()
    is_json = file.suffix == ".json"
    file.write_bytes(data.draw(json_texts(json.loads(content)) if is_json else damaged(content)))

    with attempt("adapters of PEFT"):
        import_adapter(folder, base)


def _pickle() -> bytes:
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((2, 3)).astype(np.float32) for name in "ab"}
    file = io.BytesIO()
    file.stem = "archive"  # pyright: ignore[reportAttributeAccessIssue]
    write_torch_file(file, tensors)  # pyright: ignore[reportArgumentType]
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


_OPCODES = st.sampled_from([bytes([code]) for code in b"(.0123FIJKLMNRTUVX]abcdeghijlopqrstu}Q)"])


@fuzz(quick=80, share=0.08)
@given(damaged(_pickle()) | st.lists(_OPCODES, max_size=30).map(b"".join))
def test_pickles(tmp_path_factory: pytest.TempPathFactory, pickle: bytes):
    file = tmp_path_factory.getbasetemp() / "fuzz.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        for number in range(2):
            archive.writestr(f"archive/data/{number}", bytes(24))

    with attempt("pickles"):
        read_torch_file(file)
