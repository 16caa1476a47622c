"""Base models that are quantized while they are loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from hf_models import save_tiny_llama
from jax.sharding import NamedSharding
from tolerances import ROUNDING

import moe_jax
from moe_jax.config.model import ComputeConfig
from moe_jax.config.run import MeshConfig
from moe_jax.errors import UserError
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import abstract_base_params, load_base_params
from moe_jax.layers.quantized import QuantizedKernel, dense_kernel, quantize
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.mesh import make_mesh
from moe_jax.sharding.rules import shardings_of

KINDS = ("int8", "fp8", "nf4", "nf4_double")
# Blocks of 64 inputs: one of 128, two and a short one of 176.
WIDTHS = dict(hidden_size=128, intermediate_size=176, num_attention_heads=4, num_key_value_heads=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_llama(folder, **WIDTHS)
    return folder


def _is_quantized(leaf):
    return isinstance(leaf, QuantizedKernel)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_quantized_separately_and_the_rest_is_bfloat16(folder, kind):
    config = read_model_config(folder)
    exact, loaded = (
        load_base_params(folder, config, "float32"),
        load_base_params(folder, config, kind),
    )
    quantized = 0

    def check(path, leaf, dense):
        nonlocal quantized
        name = jax.tree_util.keystr(path)
        if not _is_quantized(leaf):
            assert "_proj" not in name
            np.testing.assert_array_equal(leaf, dense.astype(jnp.bfloat16), err_msg=name)
            return
        quantized += 1
        assert leaf.shape == dense.shape
        for layer in range(config.num_layers):
            alone = dense_kernel(jax.jit(quantize, static_argnums=1)(dense[layer], kind))
            np.testing.assert_allclose(dense_kernel(leaf)[layer], alone, **ROUNDING, err_msg=name)
        assert not np.array_equal(dense_kernel(leaf), dense)

    jax.tree_util.tree_map_with_path(check, loaded, exact, is_leaf=_is_quantized)
    assert quantized == 7
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), loaded)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract_base_params(config, kind)) == shapes


@pytest.mark.parametrize("kind", ["int8", "nf4_double"])
def test_on_a_mesh(folder, kind, devices):
    config = read_model_config(folder)
    model = LlamaForCausalLM(config, ComputeConfig(dtype="float32"), param_dtype=kind)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices)
    loaded = load_base_params(folder, config, kind, shardings_of(boxed, mesh))
    alone = load_base_params(folder, config, kind)
    jax.tree.map(np.testing.assert_array_equal, loaded, alone)
    codes = loaded["layers"]["mlp"]["gate_proj"]["kernel"].codes
    assert isinstance(codes.sharding, NamedSharding)
    assert np.prod(codes.shape) == 4 * np.prod(codes.sharding.shard_shape(codes.shape))


def test_size_of_four_bit_parameters(folder):
    config = read_model_config(folder)

    def size(dtype):
        layers = abstract_base_params(config, dtype)["layers"]
        return sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(layers))

    # 4 bits per weight and 16 per block of 64 are 4.25 of 16 bits. 176 are three blocks.
    assert 0.25 + 1 / 64 <= size("nf4") / size("bfloat16") < 0.28
    assert size("nf4_double") < size("bfloat16") * 0.29  # two floats per output cost more here
    assert 0.5 < size("int8") / size("bfloat16") < 0.54


def test_adapted_model_on_a_quantized_base(folder):
    exact = moe_jax.load_base(folder)
    tokens = np.arange(1, 17)[None]
    expected = np.asarray(moe_jax.AdaptedModel(exact, {})(tokens))
    errors = {}
    for kind in ("int8", "nf4"):
        base = moe_jax.load_base(folder, dtype=kind)
        lora = moe_jax.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",), dora=True)
        model = moe_jax.AdaptedModel(base, {"a": lora})
        logits = np.asarray(model(tokens))
        # DoRA's magnitudes start as the norms of the kernel that is stored.
        np.testing.assert_allclose(model(tokens, "a"), logits, rtol=1e-4, atol=1e-4)
        errors[kind] = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 0 < errors["int8"] < errors["nf4"] < 0.5


def test_unsupported_storage_types(tmp_path, folder):
    with pytest.raises(UserError, match=r"dtype 'nf5': not a storage type; did you mean 'nf4'"):
        moe_jax.load_base(folder, dtype="nf5")
    save_tiny_llama(tmp_path / "odd", intermediate_size=81)
    message = r"base.param_dtype: 'nf4' packs inputs in pairs, .* intermediate_size is 81; use"
    with pytest.raises(UserError, match=message):
        moe_jax.load_base(tmp_path / "odd", dtype="nf4")
    config = read_model_config(tmp_path / "odd")
    with pytest.raises(UserError, match="config." + message):
        tiny_program.program({"a": tiny_program.LORA}, config=config, param_dtype="nf4")
    moe_jax.load_base(tmp_path / "odd", dtype="int8")
