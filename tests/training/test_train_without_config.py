"""`moe-jax train` and `moe-jax plan` without a configuration file."""

import json
import shutil

import preference_run
import pytest
import tiny_run
from hf_models import tiny_model

from moe_jax.adapters import METHODS
from moe_jax.adapters.tree import TARGET_MODULES
from moe_jax.cli import main
from moe_jax.config.command_line import load_config_file
from moe_jax.config.preference import DpoConfig
from moe_jax.config.run import parse_run_config
from moe_jax.data import token_table
from moe_jax.hf.config import read_model_config
from moe_jax.training.run import defaults
from moe_jax.training.run.defaults import default_config

QWEN3_5 = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train_command")
    tiny_run.write_inputs(folder)
    return folder


def command(folder, workdir, *flags, name="train"):
    base, data = folder / "base", folder / "train.jsonl"
    arguments = [name, "--base", base, "--data", data, "--workdir", workdir, *flags]
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def run(folder):
    """A finished run of two steps."""
    workdir = folder / "run"
    assert command(folder, workdir, "--set", "training.steps=2") == 0
    return workdir


def test_settings_follow_from_base_and_data(folder, run):
    config = load_config_file(str(run / "config.py"))
    assert config["training"]["steps"] == 2
    assert config["training"]["epochs"] is None
    adapter = config["adapters"]["default"]
    # 2e-4 (4096 / 32)^0.78 = 8.80e-3, of two digits; half of the recipe's rank below width 1024.
    assert adapter["optimizer"]["learning_rate"] == 8.8e-3
    assert adapter["method"]["rank"] == 8
    rows = len((folder / "train.jsonl").read_text().splitlines())
    assert adapter["data"]["validation"]["held_out"]["split"] == f"train[-{rows // 20}:]"
    assert (run / "adapters" / "default").exists()


def test_the_data_is_tokenized_once(folder, tmp_path, monkeypatch):
    """Reading the lengths fills the cache that the run reads."""
    encode, counts = token_table.encode_examples, []

    def counted(examples, *arguments):
        counts.append(len(examples))
        return encode(examples, *arguments)

    monkeypatch.setattr(token_table, "encode_examples", counted)
    data = folder / "fresh.jsonl"  # rows that no other test has cached
    rows = (folder / "train.jsonl").read_text().replace("fox", "old fox")
    data.write_text(rows)
    inputs = folder / "base", data
    arguments = zip(("--base", "--data", "--workdir"), (*inputs, tmp_path / "run"), strict=True)
    flags = [str(text) for pair in arguments for text in pair]
    assert main(["train", *flags, "--set", "training.steps=1"]) == 0
    assert sorted(counts) == [5, 95]  # the held-out rows and the others
    longest = load_config_file(str(tmp_path / "run" / "config.py"))
    assert longest["adapters"]["default"]["data"]["max_length"] == 32


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("optimizer.learning_rate=1e-4", "give config.adapters.default.optimizer.learning_rate"),
        ("adapters.default.data.validation=None", "got None; write {} for none"),
        ("mesh.fsdp=-1", "config.mesh.fsdp: only one axis may be -1, but data and fsdp are"),
        ("training.stesp=3", "config.training.stesp: unknown field; did you mean 'steps'?"),
    ],
)
def test_fields_are_checked_before_the_data_is_read(folder, tmp_path, capsys, field, words):
    (tmp_path / "broken.jsonl").write_text("{")
    flags = ["--base", folder / "base", "--data", tmp_path / "broken.jsonl", "--set", field]
    assert main(["train", *map(str, flags)]) == 2
    assert words in capsys.readouterr().err


def test_columns_of_other_names(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    data = tmp_path / "renamed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    flags = ["train", "--base", folder / "base", "--data", data, "--workdir", tmp_path / "run"]
    steps = ["--set", "training.steps=1"]
    assert main([str(flag) for flag in [*flags, *steps]]) == 2
    assert "--schema and --column FIELD=NAME" in capsys.readouterr().err
    columns = ["--column", "prompt=question", "--column", "completion=answer"]
    assert main([str(flag) for flag in [*flags, *columns, *steps]]) == 0
    file = tmp_path / "run" / "config.py"
    assert " --column prompt=question --column completion=answer\n" in file.read_text()
    sets = load_config_file(str(file))["adapters"]["default"]["data"]
    for source in (sets["train"]["train"], sets["validation"]["held_out"]):
        assert source["columns"] == {"prompt": "question", "completion": "answer"}


def test_a_smaller_max_length_leaves_out_longer_buckets(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(defaults, "free_memory", lambda: None)  # compiles nothing
    data = tmp_path / "long.jsonl"
    # 100 rows of about 20 tokens, 100 of about 90 and one of about 300.
    words = [10] * 100 + [80] * 100 + [290]
    rows = [{"prompt": "the", "completion": " fox" * count} for count in words]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def lengths(max_length):
        fields = {"schema": None, "method": "lora", "say": lambda _: None, "max_length": max_length}
        made = default_config(str(folder / "base"), str(data), **fields)
        parse_run_config(made, METHODS)  # refuses buckets that are too long
        return made["adapters"]["default"]["data"]

    whole, short = lengths(None), lengths(96)
    assert whole["max_length"] == 256  # the limit of the base
    assert whole["buckets"][-1] > 64
    assert short["max_length"] == 96
    assert all(length <= 72 for length in short["buckets"])


@pytest.fixture(scope="module")
def mixed(folder):
    """A base with linear attention in every other layer, with the tokenizer of the other base."""
    target = folder / "mixed"
    shutil.copytree(folder / "base", target, ignore=shutil.ignore_patterns("*.safetensors"))
    vocab_size = read_model_config(folder / "base").vocab_size
    tiny_model("qwen3_5_text", **QWEN3_5, vocab_size=vocab_size).save_pretrained(target)
    return target


def test_a_base_with_linear_attention_is_trained_and_exported(folder, mixed, tmp_path, capsys):
    workdir, data = tmp_path / "run", folder / "train.jsonl"
    flags = ["--base", mixed, "--data", data, "--workdir", workdir]
    settings = ["--set", "training.steps=2", "--set", "training.log_every=1"]
    assert main(["train", *map(str, flags), *settings]) == 0
    method = load_config_file(str(workdir / "config.py"))["adapters"]["default"]["method"]
    added = {"in_proj_qkv", "in_proj_z", "out_proj"}
    assert set(method["target_modules"]) == {*TARGET_MODULES, *added}
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    entropies = [row[name] for row in rows for name in row if name.endswith("layer_entropy")]
    assert [len(layers) for layers in entropies] == [4, 4]  # every layer has a router
    adapter = workdir / "adapters" / "default"
    assert main(["show", str(adapter)]) == 0
    assert "linear_attn/in_proj_qkv" in capsys.readouterr().out


def test_preferences(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "free_memory", lambda: None)  # compiles nothing
    data = tmp_path / "pairs.jsonl"
    rows = [preference_run.pair(i) for i in range(40)]
    preference_run.write_rows(data, rows)
    fields = {"schema": None, "method": "lora", "say": lambda _: None}
    made = default_config(str(folder / "base"), str(data), **fields, preference="dpo")
    adapter = parse_run_config(made, METHODS).adapters["default"]
    assert adapter.preference == DpoConfig()
    assert adapter.data.train["train"].schema == "preference"
    # A fortieth of the rate above.
    assert adapter.optimizer.learning_rate == 2.2e-4

    inputs = ["train", "--base", str(folder / "base"), "--data", str(data)]
    assert main([*inputs, "--workdir", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert (
        "the preference loss dpo, orpo or simpo, given by its field `preference` or --pref" in said
    )
    assert main([*inputs, "--workdir", str(tmp_path / "a"), "--preference", "dop"]) == 2
    assert "preference.name: unknown preference loss 'dop'" in capsys.readouterr().err


def test_the_written_file_continues_the_run(folder, run, capsys):
    assert main(["train", "--config", str(run / "config.py")]) == 0
    assert "already finished at step 2" in capsys.readouterr().out
    assert command(folder, run, "--set", "training.steps=2") == 0
    assert "already finished at step 2" in capsys.readouterr().out
    text = (run / "config.py").read_text()
    assert f"--data {folder / 'train.jsonl'}" in text
    assert "--set training.steps=2" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "lora"], "was made by another command"),
        (["--set", "training.steps"], "--set training.steps: expected FIELD=VALUE"),
    ],
)
def test_another_command_in_the_same_folder_is_refused(folder, run, capsys, flags, message):
    assert command(folder, run, *flags) == 2
    assert message in capsys.readouterr().err


def test_refusals(folder, tmp_path, capsys):
    assert command(folder, tmp_path / "a", "--set", "adapters.default.data.streaming=True") == 2
    assert "write a configuration file that streams" in capsys.readouterr().err
    assert main(["train", "--base", str(folder / "base")]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_plan(folder, tmp_path, capsys):
    assert command(folder, tmp_path / "a", name="plan") == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(line.startswith("adapter ") for line in lines)
    assert count == 1
    assert not (tmp_path / "a").exists()
