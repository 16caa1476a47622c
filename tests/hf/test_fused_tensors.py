"""Tensors that hold several projections are split on loading, on one device and on several."""

import jax
import numpy as np
import pytest
from hf_models import tiny_model
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from moe_jax.errors import CheckpointError
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import abstract_base_params, load_base_params

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"


def _save(folder) -> dict[str, np.ndarray]:
    """A Phi-3 with 4 query and 2 key heads of 8 channels, D 32 and F 48."""
    model = tiny_model("phi3")
    model.save_pretrained(folder)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def _expected(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kernels of the projections, sliced by hand."""

    def stacked(tensor: str, start: int, stop: int) -> np.ndarray:
        names = [f"model.layers.{layer}.{tensor}.weight" for layer in range(3)]
        return np.stack([state[name][start:stop].T for name in names])

    return {
        "q_proj": stacked(QKV, 0, 32),
        "k_proj": stacked(QKV, 32, 48),
        "v_proj": stacked(QKV, 48, 64),
        "gate_proj": stacked(GATE_UP, 0, 48),
        "up_proj": stacked(GATE_UP, 48, 96),
    }


def _kernels(params) -> dict[str, np.ndarray]:
    layers = params["layers"]
    blocks = {**layers["self_attn"], **layers["mlp"]}
    return {name: np.asarray(leaves["kernel"]) for name, leaves in blocks.items()}


@pytest.mark.parametrize("axes", [(None, None), (None, "a"), ("a", None), ("b", "a")])
def test_parts_are_the_projections(axes, tmp_path, devices):
    state = _save(tmp_path)
    config = read_model_config(tmp_path)
    mesh = jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2, devices=devices)
    kernel, other = PartitionSpec(None, *axes), PartitionSpec()
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, kernel if len(leaf.shape) == 3 else other),
        abstract_base_params(config, "float32"),
    )
    kernels = _kernels(load_base_params(tmp_path, config, "float32", shardings))
    for name, expected in _expected(state).items():
        np.testing.assert_array_equal(kernels[name], expected, err_msg=name)


def test_a_tensor_with_too_few_rows_is_refused(tmp_path):
    _save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.{QKV}.weight"
    tensors[name] = tensors[name][:48]  # without the values
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"qkv_proj\.weight: has shape \[48, 32\], but by config.json .* \[64, 32\]"
    with pytest.raises(CheckpointError, match=message):
        load_base_params(tmp_path, read_model_config(tmp_path), "float32")
