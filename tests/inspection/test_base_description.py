"""Descriptions of checkpoints, against transformers and arithmetic."""

import json

import numpy as np
import pytest
from hf_models import save_tiny_llama, tiny_model
from inspection.conftest import BASE
from safetensors.numpy import load_file, save_file

import moe_jax
from moe_jax.cli import main


def test_counts_and_sizes_are_those_of_the_files(tmp_path):
    model = save_tiny_llama(tmp_path / "base")
    described = moe_jax.describe_base(tmp_path / "base")
    assert described.parameters == sum(p.numel() for p in model.parameters())
    by_module = {}
    for name, parameter in model.named_parameters():
        parts = [
            part
            for part in name.split(".")[:-1]
            if part not in ("model", "layers") and not part.isdigit()
        ]
        by_module["/".join(parts)] = by_module.get("/".join(parts), 0) + parameter.numel()
    assert described.modules == by_module
    assert described.stored == {"F32": 4 * described.parameters}
    file = tmp_path / "base" / "model.safetensors"
    assert described.files == {file.name: file.stat().st_size}
    assert described.architecture == "LlamaForCausalLM"


def test_layers_without_positions_are_counted(tmp_path):
    tiny_model("smollm3", no_rope_layers=[1, 0, 1]).save_pretrained(tmp_path)
    (line,) = (x for x in moe_jax.describe_base(tmp_path).lines() if x.startswith("positions"))
    assert line == "positions  64, rope default, theta 2e+06; none in 1 of 3 layers"


def test_modules_that_some_layers_have_and_leaves_of_a_layer_itself(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    tiny_model("gemma4_text", num_hidden_layers=4, layer_types=kinds, **sizes).save_pretrained(
        tmp_path
    )
    described = moe_jax.describe_base(tmp_path)
    assert all(described.modules)  # none without a name
    assert described.modules["layer_scalar"] == 4
    heads = described.config.num_heads
    width = described.config.hidden_size
    assert described.modules["self_attn/q_proj"] == 2 * width * heads * 8
    assert described.modules["global_attn/q_proj"] == 2 * width * heads * 16


def test_tensors_beside_the_model_are_named(tmp_path):
    save_tiny_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "score.weight": np.ones(3, np.float32)}, file)
    described = moe_jax.describe_base(tmp_path)
    assert described.lines()[-1 - len(described.modules)].split() == [
        *("not", "read", "score.weight,", "as", "no", "part", "of", "the", "model")
    ]


def test_the_weights_are_not_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    for name in ("load_base_params", "_load_leaf", "read_leaf"):
        monkeypatch.setattr(f"moe_jax.hf.load.{name}", refuse)
    assert moe_jax.describe_base(BASE).parameters > 0


def test_adapter_parameters_by_hand(capsys):
    config = json.loads((BASE / "config.json").read_text())
    layers, width, wide = (
        config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    options = ["--method", "mixlora", "--rank", "4", "--num-experts", "2"]
    options += ["--target-modules", "o_proj,down_proj"]
    assert main(["inspect", "--base", str(BASE), *options]) == 0
    out = capsys.readouterr().out
    heads = config["num_attention_heads"] * config["head_dim"]
    attention = layers * 4 * (heads + width)
    experts = layers * 2 * 4 * (wide + width)
    router = layers * 2 * width
    assert f"{attention + experts + router:,} parameters (" in out
    assert f"on o_proj, down_proj of {layers} layers" in out
    for module, count in (
        ("self_attn/o_proj", attention),
        ("mlp/moe/router", router),
        ("mlp/moe/down_proj", experts),
    ):
        (line,) = [line for line in out[out.index("adapter") :].splitlines() if module in line]
        assert line.split()[1] == f"{count:,}"
    assert "llama (LlamaForCausalLM)" in out and f"{layers}, width {width}" in out


def test_the_adapters_of_a_configuration(capsys):
    assert main(["inspect", "--base", str(BASE), "--config", "configs/tiny_mixlora.py"]) == 0
    assert "adapter    default: mixlora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--base to describe a checkpoint"),
        (["--base", "/nowhere"], "/nowhere: no such folder"),
        (["--base", "{}", "--method", "mixlor"], "--method: unknown method 'mixlor'; did you"),
        (["--base", "{}", "--method", "lora", "--num-experts", "4"], "lora has no experts"),
        (["--base", "{}", "--method", "mixlora", "--num-experts", "1"], "--num-experts: must be"),
        (["--base", "{}", "--method", "lora", "--rank", "0"], "error: --rank: must be"),
        (["--base", "{}", "--method", "lora", "--target-modules", "q"], "error: --target-modules:"),
        (["--base", "{}", "--method", "mola", "--num-experts", "2,4,8"], "into 3 equal groups"),
        (["--base", "{}", "--rank", "4"], "--rank: requires --method"),
        (["--base", "{}", "--data", "a.txt"], "--data: requires --adapter"),
        (["--base", "{}", "--column", "text=a"], "--column: requires --adapter"),
    ],
)
def test_errors_are_one_line(capsys, arguments, words):
    assert main(["inspect", *(text.replace("{}", str(BASE)) for text in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err, captured.err
    assert len(captured.err.splitlines()) == 1


def test_damaged_checkpoint_is_rejected(tmp_path):
    save_tiny_llama(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(moe_jax.UserError, match="truncated or damaged"):
        moe_jax.describe_base(tmp_path / "base")
