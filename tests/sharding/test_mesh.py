"""Meshes of the devices, and errors for meshes of the wrong size."""

import types

import pytest
from jax.sharding import AxisType

from moe_jax.config.run import MeshConfig
from moe_jax.errors import DeviceError
from moe_jax.sharding.mesh import make_mesh, platform_of


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 4)),
        ({"data": 1, "fsdp": 1, "tensor": 8}, (1, 1, 8)),
    ],
)
def test_all_devices_are_used_once(config, shape, devices):
    mesh = make_mesh(MeshConfig(**config))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in devices]
    assert mesh.axis_types == (AxisType.Auto,) * 3


def test_neighbors_share_the_innermost_axis(devices):
    # Tensor parallelism talks most, so its group must be the devices closest to each other.
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert [d.id for d in mesh.devices[0, 0]] == [devices[0].id, devices[1].id]


@pytest.mark.parametrize(
    ("config", "count", "message"),
    [
        (
            {"data": 16},
            8,
            "data=16 x fsdp=1 x tensor=1 needs 16 devices, but 8 (cpu) are available",
        ),
        ({"fsdp": 3, "tensor": 3}, 8, "data=1 x fsdp=3 x tensor=3 needs 9 devices, but 8"),
        (
            {"data": 4},
            8,
            "data=4 x fsdp=1 x tensor=1 uses only 4 devices, but 8 (cpu) are available",
        ),
        ({"fsdp": 3}, 8, "data=2 x fsdp=3 x tensor=1 uses only 6 devices, but 8"),
        ({"data": 2}, 1, "data=2 x fsdp=1 x tensor=1 needs 2 devices, but 1"),
    ],
)
def test_devices_that_do_not_fit(config, count, message, devices):
    with pytest.raises(DeviceError) as error:
        make_mesh(MeshConfig(**config), devices[:count])
    assert message in str(error.value)
    assert "choose axes whose product is" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "platform"), [("cuda", "gpu"), ("gpu", "gpu"), ("tpu", "tpu")])
def test_the_platform_of_devices(name, platform):
    assert platform_of([types.SimpleNamespace(platform=name)]) == platform
