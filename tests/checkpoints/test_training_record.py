"""The training record beside an adapter's weights: its format, and invalid records."""

import dataclasses
import json

import pytest
from record_adapter_format import ROOT, STORED, example_adapter
from training_record import PICTURES, example_record

from moe_jax.checkpoints.adapter_files import load_adapter, save_adapter
from moe_jax.checkpoints.training_record import RECORD_VERSION, add_accuracies
from moe_jax.cli import main
from moe_jax.errors import CheckpointError

RECORDED = ROOT / f"training_record_{RECORD_VERSION}.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / STORED
    save_adapter(
        folder, example_adapter(STORED)._replace(training=example_record(), pictures=PICTURES)
    )
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy that the test may change."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "weights").symlink_to(written / "weights")
    for name in ("adapter.json", "training.json", *PICTURES):
        (copy / name).write_bytes((written / name).read_bytes())
    return copy


def test_the_format_is_unchanged(written):
    """If this fails, raise `RECORD_VERSION` and record the new text."""
    assert (written / "training.json").read_text() == RECORDED.read_text()
    files = sorted(path.name for path in written.iterdir())
    assert files == ["adapter.json", "experts.png", "loss.png", "training.json", "weights"]


def test_round_trip(written):
    loaded = load_adapter(written)
    assert loaded.training == example_record()
    assert loaded.pictures == PICTURES


def test_an_edit_is_refused_and_can_be_meant(folder):
    file = folder / "training.json"
    content = {**json.loads(file.read_text()), "seed": 4}
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder)
    assert str(error.value) == (
        f'{file}: differs from its digest; set "digest": null to keep an edit, or delete the file '
        "to use the adapter without it"
    )
    file.write_text(json.dumps({**content, "digest": None}))
    assert load_adapter(folder).training == dataclasses.replace(example_record(), seed=4)
    add_accuracies(folder, 30, {"boolq": {"acc": 0.125}})
    assert json.loads(file.read_text())["digest"]


def test_accuracies_are_added(folder):
    add_accuracies(folder, 30, {"boolq": {"acc": 0.125}})
    expected = dataclasses.replace(
        example_record(), accuracies={"boolq": {"acc": 0.125}}, accuracies_step=30
    )
    assert load_adapter(folder).training == expected
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_adapter_without_a_record(folder):
    for name in ("training.json", *PICTURES):
        (folder / name).unlink()
    loaded = load_adapter(folder)
    assert loaded.training is None
    assert loaded.pictures == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"record_version": 4}, "record version 4, this release reads 5"),
        ({"record_version": True}, "record version True, this release reads 5"),
        ({"batch_size": "8"}, "batch_size: expected "),
        ({"learned": True}, "learned: unknown field"),
        ({"train": {"words": {"path": "x"}}}, "train.words"),
        (None, "cannot be read"),
    ],
)
def test_invalid_records(folder, change, words):
    file = folder / "training.json"
    content = {**json.loads(file.read_text()), "digest": None}
    text = "{" if change is None else json.dumps({**content, **change})
    file.write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_adapter(folder)
    assert str(error.value).startswith(str(file))
    assert words in str(error.value)
    assert str(error.value).endswith("delete the file to use the adapter without it")


def test_show_prints_a_summary(written, capsys):
    assert main(["show", str(written)]) == 0
    shown = capsys.readouterr().out
    assert "         adamw, learning rate 0.001, 8 rows a step, seed 3\n" in shown
    assert "data     train words: 100 rows of /home/someone/data/words.jsonl\n" in shown
    assert "data     validation held_out: 11 rows of boolq\n" in shown
    assert "loss     training 1.2500, held_out 1.5000\n" in shown
    assert "         began from /home/someone/upcycled\n" in shown
    assert "metrics  held_out: accuracy 0.7500\n" in shown
    assert "tasks    boolq: label_acc 0.5000, acc 0.6250\n" in shown
