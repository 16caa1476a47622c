"""The adapters' own format is what was recorded for its version; see `record_adapter_format.py`.

If one of these fails, adapters that people have cannot be read any more, or older releases cannot
read new ones and do not know it. Either the change was not meant, or `FORMAT_VERSION` has to be
raised and the new format recorded.
"""

import json

import pytest
from foreign_adapters import require_same_bits
from record_adapter_format import (
    METHOD_CONFIGS,
    ROOT,
    STORED,
    layout,
    made_adapter,
)

from moe_jax.adapters import METHODS
from moe_jax.adapters.routing.router import ROUTERS
from moe_jax.checkpoints.adapter_files import FORMAT_VERSION, load_adapter, save_adapter
from moe_jax.config.parse import parse_member, to_plain

RECORDED = ROOT / str(FORMAT_VERSION)


@pytest.fixture(scope="module")
def recorded():
    return json.loads((RECORDED / "layout.json").read_text())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / STORED
    save_adapter(folder, made_adapter(STORED))
    return layout(folder)


def test_files_and_fields(recorded, written):
    assert written["files"] == recorded["files"]
    assert written["description"] == recorded["description"]
    assert written["base"] == recorded["base"]


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_leaves_of_every_method(recorded, written, name):
    assert written["methods"][name]["leaves"] == recorded["methods"][name]["leaves"]


def test_settings(recorded, written):
    """A field may be added, with a default that changes nothing; none may go or change its type."""
    require_kept(recorded["model"], written["model"])
    for name, config in METHOD_CONFIGS.items():
        former = recorded["methods"][name]["method"]
        require_kept(former, written["methods"][name]["method"])
        assert parse_member(METHODS, former, name) == parse_member(METHODS, config, name)
        require_kept(former, to_plain(parse_member(METHODS, former, name)))


def require_kept(former, present):
    """Fails unless all that `former` has is in `present` too."""
    if isinstance(former, dict):
        for key, value in former.items():
            require_kept(value, present[key])
    else:
        assert present == former
        assert type(present) is type(former)


def test_nothing_is_left_out(recorded):
    methods = [entry["method"] for entry in recorded["methods"].values()]
    assert {method["name"] for method in methods} >= {"lora", "mixlora", "loramoe", "mola"}
    routers = {method["router"]["name"] for method in methods if "router" in method}
    shipped = {name for name, cls in ROUTERS.items() if cls.__module__.startswith("moe_jax.")}
    assert routers == shipped


def test_an_adapter_of_that_version_is_read():
    """Written once, and kept: what it holds follows from `made_adapter`."""
    found, expected = load_adapter(RECORDED / STORED), made_adapter(STORED)
    require_same_bits(found, expected)
    assert found._replace(tree=None) == expected._replace(tree=None)
