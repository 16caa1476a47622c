"""MixLoRA's experts in GPU kernels, interpreted on a CPU, and lowered for a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
from jax.sharding import AbstractDevice, AbstractMesh
from tolerances import GRADIENT_OF_LARGEST, GRADIENT_ROUNDING

from moe_jax.adapters import fused_slots
from moe_jax.adapters.expert_slots import SlotInputs, expert_slots
from moe_jax.adapters.lora.low_rank import ExpertPairs
from moe_jax.errors import ConfigError, DeviceError
from moe_jax.layers.activation import ACTIVATIONS
from moe_jax.layers.dropout import dropout
from moe_jax.training.step import program as training_program

WIDTH = 5
"""D, which the slots do not see."""


def _inputs(tokens, features, experts, rank, slots, dtype):
    """Arrays of a layer, and cotangents; token 2 has no expert in its last slot."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0, dtype=dtype):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    chosen = np.stack([rng.permutation(experts)[:slots] for _ in range(tokens)])
    dispatch = np.eye(experts, dtype=np.float32)[chosen]
    dispatch[2, -1] = 0.0
    shapes = {
        "gate_proj": (WIDTH, features),
        "up_proj": (WIDTH, features),
        "down_proj": (features, WIDTH),
    }
    trained = {
        "gate": normal(tokens, features),
        "up": normal(tokens, features),
        "pairs": {
            name: ExpertPairs(
                normal(wide, experts, rank, scale=0.3),
                normal(experts, rank, out, scale=0.3),
                None,
                2.0,
            )
            for name, (wide, out) in shapes.items()
        },
        "z": {name: normal(tokens, experts, rank) for name in ("gate_proj", "up_proj")},
        "weights": jnp.asarray(rng.random((tokens, slots)), jnp.float32),
    }
    cotangents = (
        normal(tokens, features, dtype=jnp.float32),
        normal(tokens, experts, rank, dtype=jnp.float32),
    )
    return trained, jnp.asarray(dispatch), cotangents


def _slots_of(form, activation="silu", rate=None):
    """A function of the trained arrays with the results of `form`; `rate` is that of dropout."""

    def results(trained, dispatch):
        inputs = SlotInputs(
            trained["gate"],
            trained["up"],
            gate_bias=None,
            up_bias=None,
            activation=ACTIVATIONS[activation],
            down_kernel=None,
            hidden_dropout=None,
            down_dropout=rate,
        )
        keys = jax.random.split(jax.random.key(5), (dispatch.shape[1], 2))
        keys = None if rate is None else keys
        return form(inputs, trained["pairs"], trained["z"], dispatch, trained["weights"], keys)

    return results


def _each_token(inputs, pairs, z, dispatch, weights, keys):
    """Plain loop over slots and experts: each token with the pair of its own expert."""
    hidden, codes = 0.0, jnp.zeros_like(z["gate_proj"])
    for c in range(dispatch.shape[1]):
        gate, up = inputs.gate, inputs.up
        for e in range(dispatch.shape[2]):
            own = dispatch[:, c, e][:, None]
            gate += own * (z["gate_proj"][:, e] @ pairs["gate_proj"].lora_b[e])
            up += own * (z["up_proj"][:, e] @ pairs["up_proj"].lora_b[e])
        expert = weights[:, c][:, None] * inputs.activation(gate) * up
        hidden += expert
        if keys is not None:
            expert = dropout(expert, inputs.down_dropout, keys[c, 1])
        for e in range(dispatch.shape[2]):
            own = dispatch[:, c, e][:, None] * pairs["down_proj"].scale
            codes = codes.at[:, e].add(own * (expert @ pairs["down_proj"].lora_a[:, e]))
    return hidden, codes


def _results_and_gradients(form, trained, dispatch, cotangents, *options):
    def objective(trained):
        results = _slots_of(form, *options)(trained, dispatch)
        terms = zip(results, cotangents, strict=True)
        return sum(jnp.sum(r.astype(jnp.float32) * c) for r, c in terms), results

    gradients, results = jax.jit(jax.grad(objective, has_aux=True))(trained)
    return {"results": results, "gradients": gradients}


def _equal(ours, theirs):
    leaves = jax.tree_util.tree_leaves_with_path(theirs)
    for (path, expected), actual in zip(leaves, jax.tree.leaves(ours), strict=True):
        expected = np.asarray(expected, np.float64)
        np.testing.assert_allclose(
            np.asarray(actual, np.float64),
            expected,
            rtol=0,
            atol=GRADIENT_OF_LARGEST * np.abs(expected).max(),
            err_msg=jax.tree_util.keystr(path),
        )


@pytest.mark.parametrize(
    ("sizes", "activation", "rate"),
    [
        (
            (70, 130, 4, 3, 2),
            "silu",
            0.3,
        ),  # two tiles of tokens, five of features, the last not full
        ((40, 64, 5, 20, 3), "gelu_new", None),  # more slots than decide the order
    ],
)
def test_results_and_gradients_equal_those_of_plain_loops(sizes, activation, rate):
    inputs = _inputs(*sizes, jnp.float32)
    ours, einsum, plain = (
        _results_and_gradients(form, *inputs, activation, rate)
        for form in (fused_slots.fused_expert_slots, expert_slots, _each_token)
    )
    _equal(ours, plain)
    _equal(ours, einsum)


def test_bfloat16_is_as_precise_as_the_einsum_form():
    trained, dispatch, cotangents = _inputs(65, 80, 3, 8, 1, jnp.bfloat16)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    exact = _results_and_gradients(_each_token, exact, dispatch, cotangents)

    def errors(form):
        ours = _results_and_gradients(form, trained, dispatch, cotangents)
        assert ours["gradients"]["gate"].dtype == jnp.bfloat16
        return [
            np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
        ]

    for ours, einsum in zip(
        errors(fused_slots.fused_expert_slots), errors(expert_slots), strict=True
    ):
        assert ours <= 1.05 * einsum + 1e-6


def test_the_kernels_lower_for_a_gpu_that_is_not_there():
    trained, dispatch, cotangents = _inputs(70, 130, 4, 16, 2, jnp.bfloat16)

    def objective(trained):
        results = _slots_of(fused_slots.fused_expert_slots, "silu", 0.3)(trained, dispatch)
        terms = zip(results, cotangents, strict=True)
        return sum(jnp.sum(r.astype(jnp.float32) * c) for r, c in terms)

    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu)):
        traced = jax.jit(jax.value_and_grad(objective)).trace(trained)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("", "_backward_tokens", "_backward_experts"):
        assert text.count(f'name = "expert_slots{name}"') == 1
    assert text.count("xla.gpu.triton") == 3


# In a training step.

LORA = tiny_program.LORA
MIXLORA = {**tiny_program.MIXLORA, "losses": {}}


def _program(methods, **options):
    return tiny_program.program(methods, rows=2, compute={"experts": "fused"}, **options)


@pytest.fixture
def any_platform(monkeypatch):
    """Programs on a CPU, where the kernels are interpreted."""
    monkeypatch.setattr(training_program, "require_platform", lambda *_: None)


def test_a_step_of_two_adapters_equals_that_of_the_einsum_form(any_platform):
    """Inside the scan over layers, with rematerialization; the other adapter has no experts."""

    def adapters_after_a_step(experts):
        program = tiny_program.program(
            {"a": LORA, "b": MIXLORA},
            rows=2,
            compute={"remat": "frozen", "experts": experts},
            config=tiny_program.model_config(num_layers=2),
        )
        params = tiny_program.random_params(program)
        state = dataclasses.replace(
            program.init_state(params), adapters=tiny_program.random_adapters(program)
        )
        batch = program.put_train_batch(tiny_program.random_batch(4))
        return program.train_step(state, params, batch)[0].adapters

    fused, einsum = map(adapters_after_a_step, ("fused", "einsum"))
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **GRADIENT_ROUNDING),
        fused,
        einsum,
    )


def test_other_platforms_and_meshes_are_refused(any_platform, monkeypatch):
    with pytest.raises(DeviceError, match=r"config.compute.experts: 'fused' needs a mesh of one"):
        _program({"a": MIXLORA}, mesh={"data": 2}, devices=2)
    monkeypatch.undo()
    with pytest.raises(DeviceError, match=r"'fused' needs an NVIDIA GPU .* runs on a cpu"):
        _program({"a": MIXLORA}, mesh={"data": 1}, devices=1)


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        (LORA, {}, "and no adapter has"),
        ({**MIXLORA, "dora": True}, {}, "cannot compute DoRA"),
        ({**MIXLORA, "ffn_dropout": 0.1}, {}, "cannot drop hidden activations"),
        ({**MIXLORA, "router": {"name": "soft"}}, {}, "needs a router that chooses single"),
        ({**MIXLORA, "target_modules": ("up_proj", "down_proj")}, {}, "needs gate_proj, up_proj"),
        (MIXLORA, {"mlp_bias": True}, "cannot add the biases"),
        (MIXLORA, {"hidden_act": "gelu"}, "cannot compute this model's hidden_act 'gelu'"),
    ],
)
def test_what_the_kernels_cannot_compute_is_refused(any_platform, method, model, reason):
    config = tiny_program.model_config(num_layers=1, **model)
    with pytest.raises(ConfigError, match=rf"^config.compute.experts: 'fused' .*{reason}") as error:
        _program({"a": method}, config=config)
    assert "\n" not in str(error.value)


def test_arrays_too_large_for_indices_are_refused():
    wide = jax.ShapeDtypeStruct((2**20, 2**11), jnp.bfloat16)
    inputs = SlotInputs(wide, wide, None, None, ACTIVATIONS["silu"], None, None, None)
    pairs = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), ExpertPairs(None, None, None, 1.0))
    with pytest.raises(ConfigError, match=r"cannot index 2\^31 .*raise training.micro_batches"):
        fused_slots.require_fusible(inputs, pairs, jnp.ones((1, 1, 1)), drops_hidden=False)
