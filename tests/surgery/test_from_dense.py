"""LoRAs extracted from two checkpoints, compared with singular values of the differences."""

import shutil

import numpy as np
import pytest
import torch
from foreign_adapters import ATTENTION, FFN
from hf_models import tiny_model
from safetensors.torch import load_file, save_file
from surgery.plain_llama import PlainLlama, divergence
from tolerances import DIVERGENCE, FACTORS, FLOAT32_LOGITS, TRUNCATION

import moe_jax
from moe_jax import surgery
from moe_jax.checkpoints.leaves import named_leaves

TARGETS = [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in FFN)]
GATE = "model.layers.1.mlp.gate_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def tuned(world, folder, deltas):
    """A copy of the base with changed tensors."""
    shutil.copytree(world.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, delta in deltas.items():
        tensors[name] = tensors[name] + torch.tensor(delta, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def random_differences(world, rank):
    """Random differences of a rank for every projection."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: 0.1 * rng.standard_normal(shape)
    names = [f"model.layers.{layer}.{name}.weight" for layer in range(3) for name in TARGETS]
    shapes = {name: load_file(world.folder / "model.safetensors")[name].shape for name in names}
    return {name: draw(out, rank) @ draw(rank, in_) for name, (out, in_) in shapes.items()}


def test_low_rank_differences_are_exact(world, tmp_path):
    deltas = random_differences(world, 3)
    dense = tuned(world, tmp_path / "dense", deltas)
    outcome = surgery.from_dense(world.folder, dense, rank=3, alpha=6.0, output=tmp_path / "out")
    assert outcome.exact
    assert outcome.notes[0].startswith("exact, up to rounding: the differences have at most")
    saved = moe_jax.load_adapter(tmp_path / "out")
    assert saved.base.fingerprint == world.base.identity.fingerprint and saved.step == 0
    leaves = named_leaves(saved.tree)
    for name, delta in deltas.items():
        layer, block, target = name.split(".")[2:5]
        stem = f"layers/{block}/{target}"
        a, b = (np.asarray(leaves[f"{stem}/{n}"][int(layer)]) for n in ("lora_A", "lora_B"))
        np.testing.assert_allclose(2.0 * a @ b, delta.T, rtol=0, atol=FACTORS)
    expected = PlainLlama(dense).logits(None, world.rows)[0]
    np.testing.assert_allclose(world.logits(saved), expected, rtol=0, atol=FLOAT32_LOGITS)
    assert np.abs(expected - world.logits(None)).max() > 0.1


def test_the_error_of_a_lower_rank_is_measured(world, tmp_path):
    deltas = random_differences(world, 6)
    dense = tuned(world, tmp_path / "dense", deltas)
    outcome = surgery.from_dense(world.folder, dense, rank=2, data=world.text)
    lost, total = {}, {}
    for name, delta in deltas.items():
        sizes = np.square(np.linalg.svd(delta, compute_uv=False))
        module = "/".join(name.split(".")[3:5])
        lost[module] = lost.get(module, 0.0) + sizes[2:].sum()
        total[module] = total.get(module, 0.0) + sizes.sum()
    expected = {module: (lost[module] / total[module]) ** 0.5 for module in lost}
    assert dict(outcome.weight_errors) == pytest.approx(expected, rel=TRUNCATION)
    overall = (sum(lost.values()) / sum(total.values())) ** 0.5
    assert outcome.notes[0] == (
        f"not exact: rank 2 has a relative error of {overall:.3g} over all changes"
    )
    exact = PlainLlama(dense).logits(None, world.rows)[0]
    change = divergence(exact, world.logits(outcome.adapter))
    assert change[0] > 1e-3
    np.testing.assert_allclose(outcome.change, change, rtol=DIVERGENCE)


def test_differences_in_other_weights(world, tmp_path):
    deltas = {GATE: 0.1 * np.ones((48, 32)), NORM: 0.5 * np.ones(32)}
    dense = tuned(world, tmp_path / "dense", deltas)
    keywords = {"rank": 1, "output": tmp_path / "out"}
    with pytest.raises(moe_jax.UserError, match=f"also differs from the base in {NORM}, which"):
        surgery.from_dense(world.folder, dense, **keywords)
    with pytest.raises(moe_jax.UserError, match=f"in {NORM}, {GATE}, which a LoRA on up_proj can"):
        surgery.from_dense(world.folder, dense, target_modules=["up_proj"], **keywords)
    assert not (tmp_path / "out").exists()
    outcome = surgery.from_dense(world.folder, dense, leave_out=True, **keywords)
    norm = load_file(world.folder / "model.safetensors")[NORM].numpy()
    size = 0.5 * 32**0.5 / np.linalg.norm(norm)
    assert not outcome.exact
    assert outcome.notes[0].startswith("not exact: other weights differ; the projections have at m")
    assert outcome.notes[1] == (f"left out: {NORM}, relative difference up to {size:.3g} ({NORM})")


def test_refusals(world, tmp_path):
    tiny_model("llama", max_position_embeddings=24, num_hidden_layers=2).save_pretrained(
        tmp_path / "shallow"
    )
    nan = tuned(world, tmp_path / "nan", {GATE: np.full((48, 32), np.nan)})
    for dense, words in (
        (tmp_path / "shallow", "num_layers is 2, but 3 in"),
        (world.folder, "does not differ from the base in q_proj"),
        (nan, f"{GATE}: is not finite in"),
        (tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(moe_jax.UserError, match=words):
            surgery.from_dense(world.folder, dense, rank=2, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
