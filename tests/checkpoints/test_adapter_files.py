"""Adapter folders are complete or absent, and strictly checked when read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import FAULTS, files_below, flip, refusal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import moe_jax
from moe_jax import cli
from moe_jax.adapters import METHODS
from moe_jax.checkpoints.adapter_files import (
    SavedAdapter,
    add_pictures,
    capture_adapter,
    load_adapter,
    read_description,
    save_adapter,
)
from moe_jax.checkpoints.leaves import named_leaves
from moe_jax.config.model import ModelConfig
from moe_jax.config.parse import parse_member
from moe_jax.config.rope import RopeConfig
from moe_jax.errors import CheckpointError, TrainingError
from moe_jax.hf.base_model import BaseIdentity

MODEL = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    hidden_act="silu",
    max_position_embeddings=16,
    rms_norm_eps=1e-5,
    rope=RopeConfig(
        rope_type="llama3",
        rope_theta=5e5,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8,
    ),
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
)
METHOD = parse_member(
    METHODS,
    {
        "name": "mixlora",
        "rank": 4,
        "alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "num_experts": 4,
        "router": {"name": "top_k", "top_k": 3},
        "expert_lora": {"rank": 2},
        "losses": {"load_balance": {"coefficient": 0.01, "scope": "pooled"}},
    },
    "method",
)


def make_adapter(**changes):
    tree = {"layers": {"q_proj": {"lora_A": jax.random.normal(jax.random.key(0), (2, 8, 4))}}}
    base = BaseIdentity("some/base", "0" * 64)
    return SavedAdapter(METHOD, tree, MODEL, base, 30)._replace(**changes)


@pytest.fixture
def folder(tmp_path):
    save_adapter(tmp_path / "default", make_adapter())
    return tmp_path / "default"


def edit(folder, **changes):
    """Edits the description on purpose."""
    file = folder / "adapter.json"
    content = {**json.loads(file.read_text()), "digest": None, **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def require_equal(loaded, expected):
    assert loaded._replace(tree=None) == expected._replace(tree=None)
    leaves = named_leaves(loaded.tree)
    assert leaves.keys() == named_leaves(expected.tree).keys()
    for path, leaf in named_leaves(expected.tree).items():
        np.testing.assert_array_equal(leaves[path], leaf, strict=True)


def test_round_trip(folder):
    require_equal(load_adapter(folder), make_adapter())


def test_the_description_is_readable(folder):
    description = json.loads((folder / "adapter.json").read_text())
    assert description["format_version"] == 2
    assert description["package_version"] == moe_jax.__version__
    assert description["method"]["name"] == "mixlora"
    assert description["method"]["num_experts"] == 4
    assert description["method"]["router"]["name"] == "top_k"
    assert description["base"] == {"path": "some/base", "fingerprint": "0" * 64}
    assert description["leaves"] == {"layers/q_proj/lora_A": [[2, 8, 4], "float32"]}


def test_saving_replaces_the_former_folder(folder):
    save_adapter(folder, make_adapter(step=60))
    assert load_adapter(folder).step == 60
    assert [p.name for p in folder.parent.iterdir()] == ["default"]


def test_a_folder_moved_by_a_killed_process_is_found(folder, capsys):
    folder.rename(folder.with_name(".default.former"))
    assert load_adapter(folder).step == 30
    assert moe_jax.load_adapter(folder).step == 30
    assert cli.main(["show", str(folder)]) == 0
    assert "trained  30 steps" in capsys.readouterr().out
    assert not folder.exists(), "reading changes nothing"
    add_pictures(folder, {"loss.png": b"a picture"})
    assert load_adapter(folder).pictures == {"loss.png": b"a picture"}
    assert [p.name for p in folder.parent.iterdir()] == ["default"]


def test_onto_a_mesh(folder, devices):
    sharding = NamedSharding(Mesh(np.array(devices[:4]), ("x",)), PartitionSpec(None, None, "x"))
    tree = {"layers": {"q_proj": {"lora_A": sharding}}}
    loaded = load_adapter(folder, tree).tree["layers"]["q_proj"]["lora_A"]
    assert loaded.sharding == sharding
    np.testing.assert_array_equal(
        loaded, make_adapter().tree["layers"]["q_proj"]["lora_A"], strict=True
    )


def test_capture_is_independent_of_later_steps(folder, devices):
    # A step donates the arrays on every device before their copy is written.
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    adapter, step = load_adapter(folder), 31
    sharding = NamedSharding(Mesh(np.array(devices[:2]), ("x",)), PartitionSpec(None, "x"))
    tree = jax.device_put(adapter.tree, sharding)
    write = capture_adapter(folder, adapter._replace(tree=tree, step=step))
    jax.block_until_ready(double(tree))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(tree)), "or this shows nothing"
    assert load_adapter(folder).step == 30, "not written yet"
    write()
    loaded = load_adapter(folder)
    assert loaded.step == step
    jax.tree.map(np.testing.assert_array_equal, loaded.tree, adapter.tree)


def test_weights_that_are_not_finite_are_not_saved(folder):
    bad = {"layers": {"q_proj": {"lora_A": jnp.full((2, 8, 4), jnp.nan)}}}
    with pytest.raises(TrainingError, match="not finite at step 30"):
        save_adapter(folder, make_adapter(tree=bad))
    assert load_adapter(folder).step == 30


@pytest.mark.parametrize("field", ["method", "base", "model", "step", "leaves", "checksums"])
def test_an_edit_is_refused_and_can_be_meant(folder, field):
    file = folder / "adapter.json"
    description = json.loads(file.read_text())
    if field == "method":
        description["method"]["alpha"] = 9.0
    elif field == "model":
        description["model"]["rms_norm_eps"] = 1e-6
    elif field == "step":
        description["step"] = 31
    else:
        description[field]["more"] = 0
    for digest in (description["digest"], "", 0, False, ...):
        edited = {**description, "digest": digest}
        file.write_text(json.dumps({k: v for k, v in edited.items() if v is not ...}))
        with pytest.raises(CheckpointError) as error:
            load_adapter(folder)
        assert str(error.value) == (
            f"{file}: differs from its digest, so it is damaged or was edited; copy the folder "
            'again, or, to load it as it is, set "digest": null in the file'
        )
    file.write_text(json.dumps({**description, "digest": None}, indent=4))
    if field in ("leaves", "checksums"):  # the weights themselves do not agree
        with pytest.raises(CheckpointError, match=r"more|list of sums"):
            load_adapter(folder)
    else:
        loaded = load_adapter(folder)
        assert loaded.method.alpha == (9.0 if field == "method" else 8.0)
        assert loaded.model.rms_norm_eps == (1e-6 if field == "model" else 1e-5)
        assert loaded.step == (31 if field == "step" else 30)


def test_the_layout_of_the_text_does_not_count(folder):
    file = folder / "adapter.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(description.items()))))
    assert load_adapter(folder)._replace(tree=None) == make_adapter()._replace(tree=None)


def test_no_bit_of_the_description_changes_an_adapter(folder):
    file = folder / "adapter.json"
    expected, content = read_description(folder), file.read_bytes()

    def require_expected(description):
        assert description == expected

    for place in range(0, len(content), 11):
        flip(file, place, place % 8)
        message = refusal(lambda: read_description(folder), require_expected)
        assert content[place] in b" \n" if message is None else str(file) in message
        file.write_bytes(content)


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files(folder, fault):
    """An adapter with a damaged file loads as it was saved, or its folder is named."""
    expected, refused = make_adapter(), set()
    for file in files_below(folder):
        content = file.read_bytes()
        if fault != "flip" or content:
            FAULTS[fault](file)
        message = refusal(lambda: load_adapter(folder), lambda got: require_equal(got, expected))
        if message is not None:
            refused.add(file.relative_to(folder).parts[0])
            assert str(folder) in message
        file.write_bytes(content)
    assert refused == {"adapter.json", "weights"}


def test_links_are_followed_by_readers_and_never_written_through(folder, tmp_path):
    """As the hub's cache and people who keep weights on another disk make them."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    for file in [folder / "adapter.json", *files_below(folder / "weights")]:
        file.unlink()
        file.symlink_to(elsewhere / file.relative_to(folder))
    assert load_adapter(folder).step == 30
    shutil.rmtree(folder / "weights")
    (folder / "weights").symlink_to(elsewhere / "weights")
    assert load_adapter(folder).step == 30
    before = {file: file.read_bytes() for file in files_below(elsewhere)}
    (elsewhere / "loss.png").write_bytes(b"its own")
    (folder / "loss.png").symlink_to(elsewhere / "loss.png")
    add_pictures(folder, {"loss.png": b"a picture"})
    assert load_adapter(folder).pictures == {"loss.png": b"a picture"}
    assert (elsewhere / "loss.png").read_bytes() == b"its own"
    (elsewhere / "loss.png").unlink()
    save_adapter(folder, make_adapter(step=60))
    assert load_adapter(folder).step == 60
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert {file: file.read_bytes() for file in files_below(elsewhere)} == before

    link = tmp_path / "link"
    link.symlink_to(folder, target_is_directory=True)
    save_adapter(link, make_adapter(step=90))
    assert link.is_symlink()
    assert load_adapter(link).step == load_adapter(folder).step == 90


@pytest.mark.parametrize("name", ["adapter.json", "weights", "weights/manifest.ocdbt"])
@pytest.mark.parametrize("target", ["gone", "itself", "up"])
def test_links_to_nowhere_are_one_line(folder, name, target):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to({"gone": folder / "gone", "itself": path, "up": folder}[target])
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 1}, "format version 1, this release reads 2"),
        ({"step": ...}, "field 'step' is missing"),
        (
            {"method": {"name": "mixlroa"}},
            "method.name: unknown method 'mixlroa'; did you mean 'mixlora'",
        ),
        ({"method": {"name": "lora", "rnk": 3}}, "method.rnk: unknown field; did you mean 'rank'"),
        ({"method": 5}, "method: expected a group of fields, got int (5); the file was changed"),
        ({"method": {"rank": 3}}, "method.name: expected a text"),
        ({"package_version": ...}, "field 'package_version' is missing"),
        ({"package_version": 1}, "package_version: expected str, got int (1)"),
        ({"step": "30"}, "step: expected int, got str ('30')"),
        ({"base": {"fingerprint": "0"}}, "base.path: expected a text"),
        ({"model": []}, "model: expected a group of fields, got list ([])"),
        ({"leaves": []}, "leaves: expected a group of fields, got list ([])"),
        ({"leaves": {"a": [[2, "8"], "float32"]}}, "leaves: 'a' is [[2, '8'], 'float32']"),
        ({"leaves": {"a": [[2], "float33"]}}, "expected a shape and a type"),
        ({"leaves": {p: [[2], "int8"] for p in ("a/b/c", "a")}}, "leaves: 'a' is"),
        ({"checksums": {"layers/q_proj/lora_A": "1"}}, "checksums.layers/q_proj/lora_A: expected"),
        ({"model": {}}, "model.vocab_size: this field is required"),
        ({"base": {}}, "damaged"),
        ({"leaves": {"layers/q_proj/lora_A": [[2, 8, 5], "float32"]}}, "has shape (2, 8, 4)"),
        ({"leaves": {"layers/q_proj/lora_B": [[2, 8, 4], "float32"]}}, "has no array for"),
        ({"leaves": {}}, "holds unexpected arrays"),
        ({"leaves": {"layers/q_proj/lora_A": 5}}, "damaged"),
        ({"checksums": {"layers/q_proj/lora_A": 1}}, "checksum of 'layers/q_proj/lora_A' differs"),
    ],
)
def test_invalid_descriptions(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder)
    assert words in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_show_command(folder, capsys):
    assert cli.main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "size     64 parameters in 1 leaves" in shown
    assert "base     some/base" in shown
    method = json.loads((folder / "adapter.json").read_text())["method"]
    edit(folder, method={**method, "rnak": 4})
    assert cli.main(["show", str(folder)]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.startswith(f"error: {folder}/adapter.json: method.rnak: unknown field; did")
    edit(folder, method=method)
    edit(folder, base={"path": "a\nb"})
    assert cli.main(["show", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}/adapter.json: base.fingerprint: ")
    assert cli.main(["show", f"{folder}\n gone"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder} gone: no adapter here")


def test_missing_adapter(tmp_path):
    with pytest.raises(CheckpointError, match=r"no adapter here, adapter\.json is missing"):
        load_adapter(tmp_path)


def test_description_that_is_not_json(folder):
    (folder / "adapter.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapter(folder)


def test_missing_weights(folder):
    (folder / "weights").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match="weights is damaged"):
        load_adapter(folder)
