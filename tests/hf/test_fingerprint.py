"""A base is known by its content, wherever it lies and however it is cut into files."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.demo.tiny_llama import write_checkpoint
from moe_jax.hf.base_model import base_fingerprint

SMALL = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 4, "num_hidden_layers": 2}


@pytest.fixture
def base(tmp_path):
    write_checkpoint(tmp_path / "base", seed=0, **SMALL)
    return tmp_path / "base"


def test_the_same_weights_in_other_files(base, tmp_path):
    write_checkpoint(tmp_path / "shards", seed=0, shards=3, **SMALL)
    assert base_fingerprint(tmp_path / "shards") == base_fingerprint(base)


def test_other_weights(base, tmp_path):
    write_checkpoint(tmp_path / "other", seed=1, **SMALL)
    assert base_fingerprint(tmp_path / "other") != base_fingerprint(base)


def test_another_type(base, tmp_path):
    write_checkpoint(tmp_path / "half", seed=0, dtype="bfloat16", **SMALL)
    assert base_fingerprint(tmp_path / "half") != base_fingerprint(base)


def test_one_tensor_that_was_trained(base):
    before, file = base_fingerprint(base), base / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name] + np.float32(1e-3)
    save_file(tensors, file)
    assert base_fingerprint(base) != before
