"""`moe-jax surgery`: output, refusals and written folders."""

import numpy as np
import pytest
from foreign_adapters import LORA, MIXLORA, require_same_bits
from tolerances import FLOAT64_ROUNDING

import moe_jax
from moe_jax.checkpoints import adapter_files
from moe_jax.checkpoints.adapter_files import save_adapter
from moe_jax.cli import main
from moe_jax.errors import CheckpointError


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):
    """A LoRA, a MixLoRA, and one with DoRA, in folders."""
    folder = tmp_path_factory.mktemp("saved")
    for name, method in (("lora", LORA), ("mix", MIXLORA), ("dora", {**MIXLORA, "dora": True})):
        save_adapter(folder / name, world.adapter(method))
    return folder


def run(*arguments):
    return main(["surgery", *map(str, arguments)])


def test_from_a_lora_to_more_experts(world, folders, tmp_path, capsys):
    up, grown = tmp_path / "up", tmp_path / "grown"
    arguments = ["--adapter", folders / "lora", "--experts", 2, "--seed", 5]
    assert run("upcycle", *arguments, "--router", "top_k:top_k=1", "--output", up) == 0
    assert capsys.readouterr().out.splitlines() == [
        "exact: the weights of a token's experts, all copies of the LoRA, sum to one",
        f"wrote {up} (mixlora)",
    ]
    arguments = ["--adapter", up, "--add", 2, "--split", "0,1", "--noise", 0]
    assert run("grow", *arguments, "--output", grown) == 0
    assert capsys.readouterr().out.splitlines() == [
        "each router has 2 more experts, copies of 0, 1",
        "exact, up to rounding: copies share the weight of their original",
        "without noise copies stay equal in training; add noise before training on",
        f"wrote {grown} (mixlora)",
    ]
    adapter = moe_jax.load_adapter(grown)
    assert adapter.method.num_experts == 4
    expected = world.logits(moe_jax.load_adapter(folders / "lora"))
    np.testing.assert_allclose(world.logits(adapter), expected, **FLOAT64_ROUNDING)
    repeated = moe_jax.surgery.grow(up, add=2, split=[0, 1], noise=0.0).adapter
    require_same_bits(repeated, adapter)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("upcycle --adapter mix --experts 2", "method 'mixlora': only a LoRA can be upcycled; t"),
        ("upcycle --adapter none --experts 2", "none: no adapter here, adapter.json is missing"),
        ("upcycle --adapter lora --experts 1", "error: --experts: must be at least 2; for one"),
        ("upcycle --adapter lora --experts 2,3", "error: --experts: 'mixlora' takes one number"),
        ("upcycle --adapter lora --to mola --experts 2,3", "3 layers cannot be divided into 2"),
        (
            "upcycle --adapter lora --experts 2 --router tpk",
            "error: --router: unknown router 'tpk'",
        ),
        ("upcycle --adapter lora --experts 2 --router top_k:k=1", "--router: k: unknown field"),
        ("upcycle --adapter lora --experts two", "--experts: expected whole numbers, got 'two'"),
        ("upcycle --adapter lora --experts 2 --router top_k:1", "--router: expected FIELD=VALUE"),
        ("merge --adapter mix --groups 0,a --data TEXT", "--groups: expected whole numbers"),
        ("prune --adapter lora --keep 2 --data TEXT", "method 'lora' has no experts that can be"),
        ("prune --adapter mix --keep 4 --data TEXT", "keep: 4, but a layer has at most 4 experts"),
        (
            "prune --adapter mix --keep 1 --data TEXT",
            "error: --keep: must be at least 2, got 1; `moe",
        ),
        ("prune --adapter mix --keep 3 --data none.txt", "none.txt: no such file or folder"),
        ("prune --adapter mix --keep 3 --data TEXT --base none", "none: no such folder"),
        ("grow --adapter mix --add 0 --data TEXT", "add: 0, but must be at least 1"),
        (
            "grow --adapter mix --times 1 --data TEXT",
            "error: --times: 1, but must be at least 2",
        ),
        ("grow --adapter mix --times 2 --split 1", "error: --split: requires --add; with --times"),
        ("grow --adapter mix --add 2 --split 1", "split: 1 experts for 2 new ones; give as many"),
        ("grow --adapter mix --add 1 --split 4", "there is no expert 4; a layer has 0 to 3"),
        ("grow --adapter mix --add 1 --noise 1.5", "noise: 1.5, but must lie in [0, 1)"),
        ("grow --adapter mix --add 1", "data: without --split, the load of experts has to be"),
        ("merge --adapter mix --into 4 --data TEXT", "into: 4, but a router has 4 experts; give"),
        ("merge --adapter mix --groups 0,1;2 --data TEXT", "groups: 0,1;2 must name each of the"),
        ("merge --adapter dora --into 2 --data TEXT", "dora: each expert rescales the columns"),
    ],
)
def test_refusals(world, folders, tmp_path, arguments, words, capsys):
    paths = {name: folders / name for name in ("lora", "mix", "dora")} | {"TEXT": world.text}
    paths |= {name: tmp_path / name for name in ("none", "none.txt")}
    flags = [paths.get(part, part) for part in arguments.split()]
    assert run(*flags, "--output", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and words in captured.err
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_use_and_a_full_disk(folders, tmp_path, capsys, monkeypatch):
    arguments = ["--adapter", folders / "lora", "--experts", 2, "--output", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    assert run("upcycle", *arguments) == 2
    assert "is not empty, and nothing in it is overwritten" in capsys.readouterr().err
    (tmp_path / "out" / "kept").unlink()

    def full(folder, num_bytes):
        raise CheckpointError(f"cannot write {folder}: it takes {num_bytes} bytes")

    monkeypatch.setattr(adapter_files, "require_space", full)
    assert run("upcycle", *arguments) == 2
    assert "cannot write" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        (None, ["upcycle", "from-dense", "prune", "grow", "merge", "start_from"]),
        ("upcycle", ["--experts", "--router", "renormalise", "straight_through", "--data"]),
        ("from-dense", ["--dense", "--rank", "--leave-out", "relative error"]),
        ("prune", ["--keep", "stays the same if no token chose a dropped expert"]),
        ("grow", ["--add", "--times", "--split", "--noise", "is exact with top_k=1"]),
        ("merge", ["--into", "--groups", "--weights", "into one gives a LoRA"]),
    ],
)
def test_help(capsys, operation, words):
    with pytest.raises(SystemExit) as exit_info:
        run(*([] if operation is None else [operation]), "--help")
    assert exit_info.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words), shown
