"""Experts merged into one FFN: weights of the mean and measured divergence."""

import numpy as np
import pytest
import torch
from foreign_adapters import LORA
from tolerances import ROUNDING
from transformers import AutoModelForCausalLM, MixtralForCausalLM
from whole_models import adapter_of, tensors_of

import moe_jax
from moe_jax.checkpoints.adapter_files import save_adapter
from moe_jax.cli import main


def experts_of(folder, projection):
    """Matrices of a Mixtral checkpoint, [L, E, out, in]."""
    tensors = tensors_of(folder)
    name = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    return np.stack(
        [
            [tensors[name.format(layer, e, projection)].numpy() for e in range(4)]
            for layer in range(3)
        ]
    )


def log_probs(logits):
    return torch.log_softmax(torch.tensor(np.asarray(logits)).double(), dim=-1)


@pytest.mark.parametrize("weights", [None, "utilization"])
def test_merged_experts_and_their_divergence(mixture, tmp_path, weights):
    _, adapter, text, rows = mixture
    notes = moe_jax.export_adapter(adapter, "llama", tmp_path / "out", weights=weights, data=text)
    moe_jax.export_adapter(adapter, "mixtral", tmp_path / "exact")
    exact = MixtralForCausalLM.from_pretrained(tmp_path / "exact").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        output = exact(torch.tensor(rows), output_router_logits=True)
        p, q = log_probs(output.logits), log_probs(merged(torch.tensor(rows)).logits)
    shares = np.full((3, 4), 0.25)
    if weights == "utilization":
        chosen = [logits.topk(2).indices.flatten() for logits in output.router_logits]
        shares = np.stack([torch.bincount(experts, minlength=4) / 256 for experts in chosen])
        assert np.abs(shares - 0.25).max() > 0.1
    for ours_name, name in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        expected = np.einsum("le,leoi->loi", shares, experts_of(tmp_path / "exact", name))
        for layer in range(3):
            actual = getattr(merged.model.layers[layer].mlp, ours_name).weight.detach().numpy()
            np.testing.assert_allclose(actual, expected[layer], **ROUNDING)
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert divergence > 0.01
    (note,) = notes
    number = note.removeprefix("KL divergence from the exact model, measured: ")
    assert float(number.removesuffix(" nats per token")) == pytest.approx(divergence, rel=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It approximates the adapter on its base: the experts of a lay" in card
    assert ("each weighted by its share of the tokens" in card) == (weights == "utilization")
    stated = card.split("exact model: ")[1].split(" nats per token, the mean over 128 tokens")[0]
    assert float(stated) == pytest.approx(divergence, rel=1e-4)
    assert "tokens of `text.txt`" in card


def test_the_divergence_of_an_exact_merge_is_zero(mixture, tmp_path):
    base, _, text, _ = mixture
    notes = moe_jax.export_adapter(adapter_of(base, LORA), "llama", tmp_path / "out", data=text)
    (note,) = notes
    assert abs(float(note.split(": ")[1].split()[0])) < 1e-6


def test_the_command(mixture, tmp_path, capsys):
    save_adapter(tmp_path / "adapter", mixture.adapter)
    paths = ["--adapter", tmp_path / "adapter", "--output", tmp_path / "out", "--to", "llama"]
    options = ["--weights", "utilization", "--data", mixture.text, "--dtype", "bfloat16"]
    assert main(["export", *map(str, (*paths, *options))]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"writing {tmp_path / 'out'}: llama, bfloat16, up to 0.2 MB\n")
    first, last = captured.out.splitlines()
    assert first.startswith("note: KL divergence from the exact model, measured: ")
    assert last == f"wrote {tmp_path / 'out'} (llama)"
    assert main(["export", *map(str, (*paths[:2], "--output", tmp_path / "x", *paths[4:]))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --data: merging experts is approximate")
    assert error.endswith("give a text file\n")
