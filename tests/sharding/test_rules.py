"""Mesh axes of the leaves, and errors for axes that the mesh does not divide."""

from typing import Any

import pytest
import tiny_program
from jax.sharding import PartitionSpec as Spec

from moe_jax.errors import ConfigError, DeviceError


def _build(mesh: dict[str, int], rows: int = 8, **overrides: Any) -> Any:
    config = tiny_program.model_config(**overrides)
    return tiny_program.program({"x": tiny_program.MIXLORA}, rows=rows, config=config, mesh=mesh)


def test_specs_of_every_kind_of_leaf():
    program = _build({"data": 2, "fsdp": 2, "tensor": 2})
    params, adapter = program.param_shardings, program.state_shardings.adapters["x"]
    layer, own = params["layers"], adapter["layers"]
    expected = [
        # [V, D], [D, V], [D], [L, D, H * Q], [L, H * Q, D], [L, D, F], [L, F, D], [L, D]
        (params["embed_tokens"]["embedding"], Spec("tensor", "fsdp")),
        (params["lm_head"]["kernel"], Spec("fsdp", "tensor")),
        (params["norm"]["scale"], Spec(None)),
        (layer["self_attn"]["k_proj"]["kernel"], Spec(None, "fsdp", "tensor")),
        (layer["self_attn"]["o_proj"]["kernel"], Spec(None, "tensor", "fsdp")),
        (layer["mlp"]["up_proj"]["kernel"], Spec(None, "fsdp", "tensor")),
        (layer["mlp"]["down_proj"]["kernel"], Spec(None, "tensor", "fsdp")),
        (layer["input_layernorm"]["scale"], Spec(None, None)),
        # A [L, in, R] and B [L, R, out]; the experts' A [L, in, E, R] and B [L, E, R, out].
        # The rank takes `fsdp` where the wide axis leaves it free.
        (own["self_attn"]["q_proj"]["lora_A"], Spec(None, "fsdp", None)),
        (own["self_attn"]["q_proj"]["lora_B"], Spec(None, "fsdp", "tensor")),
        (own["self_attn"]["o_proj"]["lora_A"], Spec(None, "tensor", "fsdp")),
        (own["self_attn"]["o_proj"]["lora_B"], Spec(None, None, "fsdp")),
        (own["mlp"]["moe"]["up_proj"]["lora_A"], Spec(None, "fsdp", None, None)),
        (own["mlp"]["moe"]["up_proj"]["lora_B"], Spec(None, None, "fsdp", "tensor")),
        (own["mlp"]["moe"]["down_proj"]["lora_A"], Spec(None, "tensor", None, "fsdp")),
        (own["mlp"]["moe"]["down_proj"]["lora_B"], Spec(None, None, None, "fsdp")),
        (own["mlp"]["moe"]["router"]["kernel"], Spec(None, "fsdp", None)),
    ]
    for sharding, spec in expected:
        assert sharding.spec == spec
        assert sharding.mesh == program.mesh


def test_a_rank_that_the_mesh_does_not_divide_is_replicated():
    method = {**tiny_program.LORA, "rank": 3}
    program = tiny_program.program({"x": method}, mesh={"data": 4, "fsdp": 2})
    own = program.state_shardings.adapters["x"]["layers"]["self_attn"]["q_proj"]
    assert own["lora_A"].spec == Spec(None, "fsdp", None)
    assert own["lora_B"].spec == Spec(None, None, "tensor")


def test_moments_are_sharded_like_their_leaves():
    program = tiny_program.program(
        {"x": tiny_program.MIXLORA},
        optimizer={"learning_rate": 1e-3},
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
    )
    shardings = program.state_shardings
    chain = shardings.opt_state.inner_states["adapter x"].inner_state.inner_state
    adam = chain[1]
    for moment in (adam.mu, adam.nu):
        assert moment["adapters"]["x"] == shardings.adapters["x"]
    assert adam.count.spec == Spec()


@pytest.mark.parametrize(
    ("mesh", "overrides", "parts"),
    [
        (
            {"data": 1, "fsdp": 8},
            {"hidden_size": 44},
            ["mesh axis fsdp: 8 devices cannot split ", " 44) evenly along its axis of 44"],
        ),
        (
            {"data": 1, "tensor": 8},
            {"intermediate_size": 84},
            ["mesh axis tensor: 8 devices cannot split ", "along its axis of 84", "of 84"],
        ),
        (
            {"data": 1, "tensor": 8},
            {"vocab_size": 100},
            ["mesh axis tensor: 8 devices ", "cannot split embed_tokens/embedding (100, 48)"],
        ),
    ],
)
def test_a_width_that_the_mesh_does_not_divide_is_named(mesh, overrides, parts):
    with pytest.raises(DeviceError) as error:
        _build(mesh, **overrides)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mesh", "rows", "micro_batches", "multiple"),
    [
        ({"data": 8}, 12, 1, 8),
        # Two adapters' rows together would divide; each has to.
        ({"data": 2, "fsdp": 4}, 4, 1, 8),
        # Eight rows divide over four devices, but a quarter of them does not.
        ({"data": 4, "tensor": 2}, 8, 4, 16),
    ],
)
def test_rows_that_the_mesh_does_not_divide(mesh, rows, micro_batches, multiple):
    with pytest.raises(ConfigError) as error:
        tiny_program.program(
            {"x": tiny_program.LORA, "y": tiny_program.LORA},
            rows=rows,
            mesh=mesh,
            training={"micro_batches": micro_batches},
        )
    message = str(error.value)
    assert message.startswith("config.adapters.x.batch_size: a micro-batch of ")
    assert f"a micro-batch of {rows // micro_batches} rows" in message
    assert f"make it a multiple of {multiple}" in message
