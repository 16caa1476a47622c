"""The public names of `moe_jax`, used as in the README."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import save_tiny_llama
from tolerances import FLOAT32_LOGITS

import moe_jax
from moe_jax.cli import main

METHOD = moe_jax.MixLoraConfig(
    rank=4, alpha=8.0, num_experts=4, target_modules=moe_jax.TARGET_MODULES
)


def test_all_names_resolve():
    for name in moe_jax.__all__:
        assert getattr(moe_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lod_base'"):
        _ = moe_jax.lod_base


def test_the_model_code_imports_no_heavy_packages():
    heavy = ("datasets", "grain", "ml_collections", "torch", "transformers", "matplotlib")
    code = (
        "import sys, moe_jax, moe_jax.models.causal_lm, moe_jax.training.step.program\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_base_adapter_forward_save_load(tmp_path):
    reference = save_tiny_llama(tmp_path / "base")
    tokens = np.random.default_rng(0).integers(0, 96, (2, 12))
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()

    base = moe_jax.load_base(tmp_path / "base")
    model = moe_jax.AdaptedModel(base, {"mine": METHOD}, seed=1)
    np.testing.assert_allclose(model(tokens), expected, rtol=0, atol=FLOAT32_LOGITS)
    np.testing.assert_allclose(model(tokens, "mine"), expected, rtol=0, atol=FLOAT32_LOGITS)

    model.adapters["mine"] = jax.tree.map(lambda leaf: leaf + 0.05, model.adapters["mine"])
    changed = model(tokens, "mine")
    assert float(jnp.abs(changed - expected).max()) > 100 * FLOAT32_LOGITS
    model.save("mine", tmp_path / "adapter")
    again = moe_jax.AdaptedModel(base, {"other": moe_jax.load_adapter(tmp_path / "adapter")})
    np.testing.assert_array_equal(again(tokens, "other"), changed)
    assert again.methods["other"] == METHOD


def test_unknown_adapters_and_tokens(tmp_path):
    save_tiny_llama(tmp_path / "base")
    model = moe_jax.AdaptedModel(moe_jax.load_base(tmp_path / "base"), {"mine": METHOD})
    with pytest.raises(moe_jax.UserError, match=r"'mne': .* did you mean 'mine'\?"):
        model([[1, 2]], "mne")
    with pytest.raises(moe_jax.UserError, match=r"is not in this model"):
        model.save("other", tmp_path / "adapter")
    with pytest.raises(moe_jax.UserError, match=r"ids from 1 to 96, .* embeddings for 0 to 95"):
        model([[1, 96]], "mine")
    for tokens, found in (
        ([], "float64 [0]"),
        ([[]], "float64 [1, 0]"),
        ([1, 2], "int64 [2]"),
        ([[1, 2], [3]], "rows of different lengths; pad them, and give segment_ids"),
        ([["a"]], "<U1 [1, 1]"),
    ):
        with pytest.raises(moe_jax.UserError) as error:
            model(tokens, "mine")
        assert str(error.value) == f"tokens: expected int [rows, length], got {found}"
    with pytest.raises(TypeError):  # compiled functions depend on it
        model.methods["mine"] = moe_jax.LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))


def test_an_adapter_of_another_base(tmp_path):
    for seed in (0, 1):
        save_tiny_llama(tmp_path / f"base{seed}", seed=seed)
    first = moe_jax.load_base(tmp_path / "base0")
    moe_jax.AdaptedModel(first, {"mine": METHOD}).save("mine", tmp_path / "adapter")
    other = moe_jax.load_base(tmp_path / "base1")
    with pytest.raises(moe_jax.UserError, match=r"was trained on the base .*base0"):
        moe_jax.AdaptedModel(other, {"mine": moe_jax.load_adapter(tmp_path / "adapter")})


def test_the_command_show(tmp_path, capsys):
    save_tiny_llama(tmp_path / "base")
    model = moe_jax.AdaptedModel(moe_jax.load_base(tmp_path / "base"), {"mine": METHOD})
    model.save("mine", tmp_path / "adapter", step=7)
    size = sum(leaf.size for leaf in jax.tree.leaves(model.adapters["mine"]))

    assert main(["show", str(tmp_path / "adapter")]) == 0
    shown = capsys.readouterr().out
    assert "method   mixlora" in shown
    assert f"{size:,} parameters" in shown
    assert "7 steps" in shown

    assert main(["show", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "adapter.json is missing" in error
    assert len(error.splitlines()) == 1
