"""Options of XLA by device and version."""

from types import SimpleNamespace

import jax
import jaxlib.version
import pytest
import tiny_program

from moe_jax.config.model import ComputeConfig
from moe_jax.config.run import MeshConfig
from moe_jax.models.adapted import CompiledLlama
from moe_jax.models.causal_lm import LlamaForCausalLM
from moe_jax.sharding.compiler_options import compiler_options
from moe_jax.sharding.mesh import make_mesh

GPU, CPU = SimpleNamespace(platform="gpu"), SimpleNamespace(platform="cpu")


@pytest.mark.parametrize(
    ("version", "device", "is_off"),
    [
        ("0.10.2", GPU, True),
        ("0.11.2", GPU, True),
        ("0.12.0.1", GPU, False),
        ("0.11.2", CPU, False),
    ],
)
def test_the_fusion_that_multiplies_twice_is_off(version, device, is_off, monkeypatch):
    monkeypatch.setattr(jaxlib.version, "__version__", version)
    fusion = compiler_options(device).get("xla_gpu_enable_dynamic_slice_fusion", True)
    assert fusion is not is_off


def test_other_devices_have_no_options():
    assert compiler_options(CPU) == {}


@pytest.fixture
def asked(monkeypatch):
    """Devices whose options were asked for; XLA refuses the options that these get."""
    devices = []

    def options(device):
        devices.append(device)
        return {"no_such_option": 1}

    for module in ("training.step.program", "models.adapted"):
        monkeypatch.setattr(f"moe_jax.{module}.compiler_options", options)
    return devices


def test_the_step_is_compiled_with_the_options(asked):
    program = tiny_program.program({"pairs": tiny_program.LORA}, rows=1)
    asked.clear()  # those of the model
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        program.lower_train_step(8).compile()
    assert asked == [program.mesh.devices.flat[0]]


@pytest.mark.parametrize("on_mesh", [False, True])
def test_functions_of_a_model_are_compiled_with_the_options(on_mesh, devices, asked):
    mesh = make_mesh(MeshConfig(), devices[1:2]) if on_mesh else None
    model = LlamaForCausalLM(tiny_program.model_config(), ComputeConfig(dtype="float32"))
    function = CompiledLlama(model, mesh).jit(lambda x: x + 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        function(1)
    assert asked == [devices[1] if on_mesh else jax.devices()[0]]
