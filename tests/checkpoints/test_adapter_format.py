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
    add_missing_methods,
    example_adapter,
    layout,
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
    save_adapter(folder, example_adapter(STORED))
    return layout(folder)


def test_files_and_fields(recorded, written):
    assert written["files"] == recorded["files"]
    assert written["description"] == recorded["description"]
    assert written["base"] == recorded["base"]


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_leaves_of_every_method(recorded, written, name):
    assert written["methods"][name]["leaves"] == recorded["methods"][name]["leaves"]


def test_settings(recorded, written):
    """Fields may be added, with neutral defaults; none may be removed or change its type."""
    require_kept(recorded["model"], written["model"])
    for name, config in METHOD_CONFIGS.items():
        former = recorded["methods"][name]["method"]
        require_kept(former, written["methods"][name]["method"])
        assert parse_member(METHODS, former, name) == parse_member(METHODS, config, name)
        require_kept(former, to_plain(parse_member(METHODS, former, name)))


def require_kept(former, present):
    """Requires that `present` contains all of `former`."""
    if isinstance(former, dict):
        for key, value in former.items():
            require_kept(value, present[key])
    else:
        assert present == former
        assert type(present) is type(former)


def test_a_new_method_is_added_to_a_recorded_version():
    recorded = {"methods": {"lora": "as recorded"}}
    written = {"methods": {"lora": "changed", "new": "written"}}
    assert add_missing_methods(recorded, written) == ["new"]
    assert recorded == {"methods": {"lora": "as recorded", "new": "written"}}


def test_every_method_is_recorded(recorded):
    methods = [entry["method"] for entry in recorded["methods"].values()]
    assert {method["name"] for method in methods} >= {"lora", "mixlora", "loramoe", "mola"}
    routers = {method["router"]["name"] for method in methods if "router" in method}
    shipped = {name for name, cls in ROUTERS.items() if cls.__module__.startswith("moe_jax.")}
    assert routers == shipped


def test_recorded_adapter_is_read():
    """The recorded folder equals `example_adapter`."""
    loaded, expected = load_adapter(RECORDED / STORED), example_adapter(STORED)
    require_same_bits(loaded, expected)
    assert loaded._replace(tree=None) == expected._replace(tree=None)
