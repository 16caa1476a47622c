"""`moe-jax verify` on a sound base, on a faulty computation of it, and without torch."""

import dataclasses

import jax
import numpy as np
import pytest
from hf_models import save_tiny_llama

from moe_jax.cli import main
from moe_jax.errors import CheckpointError
from moe_jax.layers import rope
from moe_jax.verification import checks
from moe_jax.verification.torch_reference import reference_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny_llama(folder)
    return folder


def verify(folder, capsys):
    """Exit status, and state and detail of each check by name."""
    status = main(["verify", "--base", str(folder), "--max-tokens", "12"])
    lines = capsys.readouterr().out.splitlines()
    found = {}
    for line in lines:
        name, _, rest = line.partition("  ")
        state, _, detail = rest.strip().partition(" ")
        if state in ("ok", "FAILED", "skipped"):
            found[name] = (state, detail.strip())
    return status, found, lines


def test_a_sound_base(base, capsys):
    status, found, lines = verify(base, capsys)
    assert status == 0
    assert {state for state, _ in found.values()} == {"ok"}
    assert list(found) == [
        "weights",
        "finite logits",
        "greedy decoding",
        "lora step",
        "mixlora step",
        "frozen base",
        "adapter",
        "peft export",
        "model export",
        "logits",
        "greedy text",
        "peft",
        "whole model",
    ]
    # 2 x 96 x 48 of embedding and head, 3 layers of 2 x 48^2 + 2 x 48 x 16 + 3 x 48 x 80 + 2 x 48,
    # and the last norm.
    size = 2 * 96 * 48 + 3 * (2 * 48**2 + 2 * 48 * 16 + 3 * 48 * 80 + 2 * 48) + 48
    assert found["weights"][1] == f"{size:,} parameters"
    assert lines[0].startswith("moe_jax ") and "transformers 5" in lines[0]
    assert lines[-1] == "13 passed, 0 failed, 0 skipped"


def test_a_wrong_rotary_base_is_seen_against_transformers(base, capsys, monkeypatch):
    wavelengths = rope._wavelength_scales
    monkeypatch.setattr(
        rope,
        "_wavelength_scales",
        lambda config, dim: wavelengths(dataclasses.replace(config, rope_theta=500.0), dim),
    )

    def refuse(*_):
        raise CheckpointError("not trained here,\nwhich is faster")

    monkeypatch.setattr(checks, "_train", refuse)
    status, found, lines = verify(base, capsys)
    assert status == 1
    # An error is a result like another, and the other checks are made.
    assert found["training step"] == ("FAILED", "not trained here, which is faster")
    assert found["logits"][0] == found["greedy text"][0] == "FAILED"
    assert found["finite logits"][0] == "ok"
    assert lines[-2:] == [
        "3 passed, 3 failed, 0 skipped",
        "failed: training step, logits, greedy text",
    ]


def test_products_of_float32_are_not_rounded_to_tf32(base, capsys, monkeypatch):
    asked = []

    def generate(*_):
        asked.append(jax.config.jax_default_matmul_precision)
        return []

    monkeypatch.setattr(checks, "_greedy", generate)
    monkeypatch.setattr(checks, "missing_package", lambda *names: names[0])
    verify(base, capsys)
    assert asked == ["highest"]


def test_without_torch_the_rest_is_checked(base, capsys, monkeypatch):
    def run_ours(base, work, max_tokens, dtype, add):
        add("frozen base", True, "bytes unchanged")
        return checks.Ours(np.zeros((1, 4)), np.zeros((1, 4, 9)), [], None)

    monkeypatch.setattr(checks, "_run_ours", run_ours)
    monkeypatch.setattr(checks, "missing_package", lambda *names: names[0])
    status, found, lines = verify(base, capsys)
    assert status == 0
    assert found == {
        "frozen base": ("ok", "bytes unchanged"),
        "transformers": ("skipped", "not compared: torch is not installed"),
    }
    assert lines[-1] == "1 passed, 0 failed, 1 skipped"


def test_a_base_that_does_not_exist(tmp_path, capsys):
    assert main(["verify", "--base", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(("gap", "passed"), [(0.0, True), (0.5, False)])
def test_greedy_tokens_may_differ_where_two_are_equally_likely(gap, passed):
    class Reference:
        def greedy(self, prompt, count):
            return [5, 3, 1]

        def logits(self, tokens):
            assert tokens.tolist() == [[7, 8, 5]]
            last = np.zeros((1, 3, 9), np.float32)
            last[0, -1, 3] = gap
            return last

    result = []
    tokens = np.array([[7, 8, 0, 0]])
    ours = checks.Ours(tokens, np.ones((1, 4, 9)), [5, 4, 1], None)
    add = lambda *check: result.append(check)
    checks._compare_greedy(ours, Reference(), np.ones((1, 4, 9)), 1e-2, add)
    ((name, state, detail),) = result
    assert (name, state) == ("greedy text", passed)
    assert detail.startswith("1 of 3 tokens equal those of transformers; the next two differ by")


def test_the_reference_decodes_as_transformers_does(base):
    import torch
    from transformers import AutoModelForCausalLM

    prompt = np.array([3, 1, 4, 1, 5], np.int32)
    with reference_model(base, "float32") as reference:
        found = reference.greedy(prompt, 6)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = model.generate(
        torch.tensor(prompt[None], dtype=torch.long),
        do_sample=False,
        min_new_tokens=6,
        max_new_tokens=6,
    )
    assert found == expected[0, 5:].tolist()
