"""Devices to compile for on a machine without them: their description, and messages."""

import importlib.metadata
import os
import re

import pytest

from moe_jax.compiled import target
from moe_jax.compiled.chips import CHIPS, chip_of_kind
from moe_jax.compiled.gpu_target import gpu_target
from moe_jax.errors import ConfigError


@pytest.fixture
def asked(monkeypatch):
    """What is asked of JAX's topologies; no plugin is needed."""
    calls = []

    def answer(name, platform, **options):
        calls.append((name, platform, options))
        return type("Topology", (), {"devices": ["a chip"]})

    for name in ("XLA_FLAGS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "--of_the_user")  # put back afterwards
    monkeypatch.setattr(target, "compiler_version", lambda platform: "plugin 0")
    monkeypatch.setattr(target.topologies, "get_topology_desc", answer)
    return calls


@pytest.fixture(autouse=True)
def former_checks(monkeypatch):
    """JAX's checks of a GPU are put back after a test that replaces them."""
    module = target.fused_attention_stablehlo
    for name in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(module, name, getattr(module, name))


def test_an_unknown_chip_is_refused():
    with pytest.raises(ConfigError, match=r"no chip is called 'h20'; did you mean 'h200'"):
        target.target_devices("h20")


@pytest.mark.parametrize(
    ("chip", "package", "extra"),
    [("h200", "jax-cuda13-plugin", "cuda13"), ("v5p", "libtpu", "tpu")],
)
def test_without_the_compiler_the_message_names_the_extra(chip, package, extra, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    before = dict(os.environ)
    message = f"--compile-for {chip}: needs {package}; pip install 'moe-jax[{extra}]'"
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        target.target_devices(chip)
    assert dict(os.environ) == before


def test_a_compiler_that_cannot_be_used_is_one_line(asked, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("versions differ\nand a trace")

    monkeypatch.setattr(target.topologies, "get_topology_desc", refuse)
    with pytest.raises(ConfigError, match=r"^--compile-for h200: 2 of them: versions differ$"):
        target.target_devices("h200", 2)


def test_gpus_of_one_host_are_asked_for(asked):
    assert target.target_devices("h100", 8) == ["a chip"]
    ((_, platform, options),) = asked
    assert (platform, options["topology"]) == ("cuda", "1x1x8")
    assert 'name: "NVIDIA H100 80GB HBM3"' in options["target_config"]
    # XLA takes the last of several values, so that the user's come last.
    assert os.environ["XLA_FLAGS"].startswith("--xla_gpu_autotune_level=0 ")
    assert os.environ["XLA_FLAGS"].endswith(" --of_the_user")


@pytest.mark.parametrize(
    ("chip", "count", "name", "bounds"),
    [
        ("v5p", 1, "v5p:1x1x1", (1, 1, 1)),
        ("v5p", 2, "v5p:2x1x1", (2, 1, 1)),
        ("v5p", 4, "v5p:2x2x1", None),
        ("v5p", 8, "v5p:2x2x2", None),
        ("v5p", 16, "v5p:2x2x4", None),
        ("v6e", 2, "v6e:2x1", (2, 1, 1)),
        ("v6e", 8, "v6e:2x4", None),
    ],
)
def test_a_slice_of_tpus_is_asked_for(asked, chip, count, name, bounds):
    target.target_devices(chip, count)
    options = {} if bounds is None else {"chips_per_host_bounds": bounds}
    assert asked == [(name, "tpu", options)]


def test_a_slice_has_a_power_of_two_chips(asked):
    with pytest.raises(ConfigError, match=r"--compile-for v6e: 6 of them: a slice has 1, 2, 4"):
        target.target_devices("v6e", 6)


@pytest.mark.parametrize(
    ("chip", "fields"),
    [
        ("h200", ["major: 9 minor: 0 feature_extension", "core_count: 132", "size: 151397597184"]),
        ("a100", ["major: 8 minor: 0 }", "core_count: 108", "memory_bandwidth: 2040000000000"]),
    ],
)
def test_the_description_of_a_gpu(chip, fields):
    text = gpu_target(CHIPS[chip])
    for field in fields:
        assert field in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    ("capability", "chip", "expected"),
    [("8.0", "a100", True), ("9.0", "a100", False), ("9.0", "h200", True), ("10.0", "h200", False)],
)
def test_fused_attention_sees_the_described_gpu(asked, capability, chip, expected):
    target.target_devices(chip)
    assert target.fused_attention_stablehlo.check_compute_capability(capability) is expected
    assert target.fused_attention_stablehlo.check_cudnn_version() == 92000


def test_chips_are_known_by_their_devices():
    assert chip_of_kind("NVIDIA H200") is CHIPS["h200"]
    assert chip_of_kind("TPU v6 lite") is CHIPS["v6e"]
    assert chip_of_kind("cpu") is None
    for chip in CHIPS.values():  # what kernels reach is below the peak
        assert 0.7 * chip.peak_half < chip.rates.product < chip.peak_half
        assert 0.8 * chip.peak_memory < chip.rates.memory < chip.peak_memory
        assert chip.rates_of("float32").product == pytest.approx(
            chip.rates.product * chip.peak_single / chip.peak_half
        )
