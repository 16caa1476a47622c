"""Runs in the tests' own process, which sees eight devices, on one of them."""

import contextlib
from collections.abc import Iterator

import jax
import pytest

from moe_jax.sharding.mesh import make_mesh
from moe_jax.training.run import inputs
from moe_jax.training.step import program


@contextlib.contextmanager
def one_device() -> Iterator[pytest.MonkeyPatch]:
    """While entered, meshes are made of the first device only; gives the patch to add to."""

    def mesh_of_one(config, devices=None):
        return make_mesh(config, jax.devices()[:1])

    with pytest.MonkeyPatch.context() as patch:
        for module in (inputs, program):
            patch.setattr(module, "make_mesh", mesh_of_one)
        yield patch
