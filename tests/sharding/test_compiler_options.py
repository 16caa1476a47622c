"""Options of XLA by device and version."""

from types import SimpleNamespace

import jax
import jaxlib.version
import pytest
import tiny_program

from moe_jax.sharding.compiler_options import compiler_options

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


def test_the_step_is_compiled_with_the_options(monkeypatch):
    asked = []

    def options(device):
        asked.append(device)
        return {"no_such_option": 1}

    monkeypatch.setattr("moe_jax.training.step.program.compiler_options", options)
    program = tiny_program.program({"pairs": tiny_program.LORA}, rows=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        program.lower_train_step(8).compile()
    assert asked == [program.mesh.devices.flat[0]]
