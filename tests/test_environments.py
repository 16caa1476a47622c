"""constraints.txt is made from the present pyproject.toml, and the files of a release agree."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moe_jax.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [
    requirement
    for requirement in map(Requirement, chain(PROJECT["dependencies"], *EXTRAS.values()))
    if requirement.name != "moe-jax"  # extras that include others
]
PYTHONS = ("3.11", "3.12", "3.13")


def pinned(python):
    """Version of each package in constraints.txt on Linux."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    lines = map(Requirement, (ROOT / "constraints.txt").read_text().splitlines())
    return environment, {
        canonicalize_name(line.name): str(line.specifier).removeprefix("==")
        for line in lines
        if line.marker is None or line.marker.evaluate(environment)
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_satisfy_the_project(python):
    environment, versions = pinned(python)
    for requirement in REQUIREMENTS:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: make constraints"


def test_files_of_a_release_name_one_version():
    # The release workflow compares these with the tag.
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {__version__} - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE)
