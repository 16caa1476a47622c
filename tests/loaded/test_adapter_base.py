"""The base of an adapter at the path that it recorded."""

import re

import pytest

from moe_jax.errors import CheckpointError
from moe_jax.hf.base_model import BaseIdentity, resolve_recorded


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/gone/llama", "the adapter was trained with this path"),
        ("../llama", "its path is relative to the folder in which the adapter was trained"),
    ],
)
def test_a_recorded_path_that_is_gone(path, reason):
    message = f"{re.escape(path)}: no such folder.*; .*{reason}: give the base with --base$"
    with pytest.raises(CheckpointError, match=message):
        resolve_recorded(BaseIdentity(path, "0"))


def test_a_recorded_path_that_exists(tmp_path):
    assert resolve_recorded(BaseIdentity(str(tmp_path), "0")) == tmp_path
