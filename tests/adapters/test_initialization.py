"""Initial adapters: their distributions, and independence of names, meshes and other adapters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny_program
import torch

from moe_jax.adapters.lora.low_rank import LowRankConfig

FAN_IN = {"o_proj": 48, "down_proj": 80}  # 48 for every other projection
SMALL = {"num_layers": 2}


def _by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


def _state(methods, **settings):
    config = tiny_program.model_config(**SMALL)
    program = tiny_program.program(methods, config=config, **settings)
    return program.init_state(tiny_program.random_params(program))


@pytest.fixture(scope="module")
def alone():
    return _by_path(_state({"x": tiny_program.MIXLORA}).adapters["x"])


def test_the_initial_adapter_does_not_depend_on_its_name_or_on_others(alone):
    mixlora = tiny_program.MIXLORA
    state = _state({"a": tiny_program.LORA, "x": mixlora, "y": mixlora})
    for name in ("x", "y"):
        beside = _by_path(state.adapters[name])
        assert beside.keys() == alone.keys()
        for path, leaf in alone.items():
            np.testing.assert_array_equal(beside[path], leaf, err_msg=f"{name}: {path}")


def test_the_initial_adapter_does_not_depend_on_the_mesh():
    methods = {"x": tiny_program.MIXLORA}
    # Both on the CPU: `alone` may be of a GPU, which rounds normal values otherwise.
    one = _by_path(_state(methods, mesh={"data": 1}, devices=1).adapters["x"])
    state = _state(methods, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    for path, leaf in _by_path(state.adapters["x"]).items():
        np.testing.assert_array_equal(leaf, one[path], err_msg=path)


def test_the_initial_adapter_depends_on_the_seed(alone):
    method = {**tiny_program.LORA, "target_modules": ("q_proj",)}
    for seed, equal in ((0, True), (1, False)):
        drawn = _by_path(_state({"x": method}, training={"seed": seed}).adapters["x"])
        path = "layers/self_attn/q_proj/lora_A"
        assert (drawn[path] == alone[path]).all() == equal


def test_b_is_zero_and_a_kaiming_for_the_inputs_of_its_projection(alone):
    for path, leaf in alone.items():
        assert leaf.dtype == np.float32
        if path.endswith("lora_B"):
            assert not leaf.any(), path
        elif path.endswith("lora_A"):
            bound = FAN_IN.get(path.split("/")[-2], 48) ** -0.5
            assert 0.95 * bound < np.abs(leaf).max() <= bound, path


def test_no_two_leaves_layers_or_experts_start_alike(alone):
    drawn = {path: leaf for path, leaf in alone.items() if not path.endswith("lora_B")}
    parts = [leaf[layer] for leaf in drawn.values() for layer in range(2)]
    parts += [leaf[:, :, e] for leaf in drawn.values() if leaf.ndim == 4 for e in range(4)]
    assert len({part.tobytes()[:64] for part in parts}) == len(parts)


def test_the_routers_kernel_is_normal(alone):
    kernel = alone["layers/mlp/moe/router/kernel"]  # 2 * 48 * 4 values
    assert abs(kernel.std() / 0.02 - 1) < 0.15
    assert abs(kernel.mean()) < 0.02 * 4 / kernel.size**0.5


@pytest.mark.parametrize(("ours", "theirs"), [("kaiming", True), ("gaussian", "gaussian")])
@pytest.mark.parametrize(("fan_in", "rank"), [(512, 8), (300, 64)])
def test_the_distribution_is_pefts(ours, theirs, fan_in, rank):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(fan_in, 4) for _ in range(4)))
    config = peft.LoraConfig(
        r=rank, target_modules=[str(i) for i in range(4)], init_lora_weights=theirs
    )
    named = peft.get_peft_model(model, config).named_parameters()
    reference = np.stack([p.detach().numpy().T for name, p in named if "lora_A" in name])
    init = LowRankConfig(rank=rank, alpha=1.0, init=ours).init_a(fan_in)
    drawn = np.asarray(init(jax.random.key(0), reference.shape, jnp.float32))

    # The error of a standard deviation over n values is at most its 1 / sqrt(2 n)-th part.
    tolerance = 5 / math.sqrt(2 * drawn.size)
    np.testing.assert_allclose(drawn.std(), reference.std(), rtol=tolerance)
    for values in (drawn, reference):
        assert abs(values.mean()) < 5 * values.std() / math.sqrt(values.size)
    # Quantiles tell a uniform from a normal distribution of the same deviation.
    at = [0.01, 0.1, 0.25, 0.75, 0.9, 0.99]
    np.testing.assert_allclose(
        np.quantile(drawn, at), np.quantile(reference, at), atol=0.06 * drawn.std()
    )
    if ours == "kaiming":
        np.testing.assert_allclose(np.abs(drawn).max(), np.abs(reference).max(), rtol=1e-2)


def test_gaussian_reaches_every_pair():
    method = {**tiny_program.MIXLORA, "init": "gaussian", "expert_lora": {"rank": 2}}
    drawn = _by_path(_state({"x": method}).adapters["x"])
    for path, leaf in drawn.items():
        if path.endswith("lora_A"):
            std = 1 / 2 if "/moe/" in path else 1 / 4
            assert abs(leaf.std() / std - 1) < 5 / math.sqrt(2 * leaf.size), path
