import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moe_jax.demo.tiny_llama import random_tensors, write_checkpoint, write_model


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


def test_tensors_of_another_shape_are_refused(tmp_path):
    hf_config = write_checkpoint(tmp_path, seed=0)
    tensors = random_tensors({**hf_config, "hidden_size": 64}, seed=0)
    with pytest.raises(ValueError, match="config describes"):
        write_model(tmp_path, hf_config, tensors)
