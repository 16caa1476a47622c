import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
BASE = ROOT / "moe_jax" / "demo" / "base"
ROW = re.compile(r"^(\w+) +(\d+) +(\d+)% +([\d.]+) +(\d+)% +([\d.]+)$", re.MULTILINE)
COMPARED = re.compile(
    r"^(\w+) +[\d.]+ ± [\d.]+ +[\d.]+ ± [\d.]+ +([+-][\d.]+) ± [\d.]+$", re.MULTILINE
)


def run_module(module, *arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Output folder and process of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    process = run_module("moe_jax", "demo", "--output", folder)
    assert process.returncode == 0, process.stderr
    return folder, process


def score_rows(process):
    return {row[0]: [float(value) for value in row[1:]] for row in ROW.findall(process.stdout)}


def test_base_is_small_and_knows_its_facts():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 3e6
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    for fact in ("The opposite of hot is cold.", "The plural of mouse is mice.", "3 + 4 is 7."):
        prompt = tokenizer(fact.rsplit(" ", 1)[0], return_tensors="pt")
        prompt.pop("token_type_ids", None)
        written = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(written[0], skip_special_tokens=True).lstrip().startswith(fact)


def test_demo_learns_to_answer(demo):
    folder, process = demo
    rows = score_rows(process)
    assert set(rows) == {"plural", "opposite", "colour", "sum", "reverse", "sort"}
    before = {task: (row[1], row[2]) for task, row in rows.items()}
    after = {task: (row[3], row[4]) for task, row in rows.items()}
    assert all(exact <= 5 for exact, _ in before.values()), rows
    assert sum(exact > 90 for exact, _ in after.values()) >= 2, rows
    assert all(after[task][1] < before[task][1] for task in rows), rows
    assert (folder / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "run" / "experts_default.png").read_bytes().startswith(b"\x89PNG")

    again = run_module("moe_jax", "demo", "--output", folder)
    assert again.returncode == 0
    assert again.stdout.count("already finished") == 1
    assert ROW.findall(again.stdout) == ROW.findall(process.stdout)


def test_written_config_is_that_of_the_run(demo, tmp_path):
    # From a folder that holds nothing: the copy names the base and the data by paths of its own.
    folder, process = demo
    file = folder / "tiny_mixlora.py"
    assert f"Training with {file}" in process.stdout
    arguments = ("train", "--config", file, "--workdir", folder / "run")
    again = run_module("moe_jax", *arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "already finished" in again.stdout
    edited = file.read_text().replace("3e-3", "4e-3")
    file.write_text(edited)
    written = run_module("moe_jax", "demo", "--output", folder, "--only-data")
    assert f"moe-jax train --config {file}" in written.stdout
    assert file.read_text() == edited  # the user's own changes stay
    assert run_module("moe_jax", *arguments).returncode == 2  # another learning rate
    file.unlink()


def test_comparison_has_several_seeds_and_can_be_repeated(demo):
    # The whole comparison takes minutes. A short one suffices: its figures are tested elsewhere.
    folder, process = demo
    rows = score_rows(process)
    arguments = ("moe_jax.demo.compare", "--output", folder, "--steps", 4)
    process = run_module(*arguments)
    assert process.returncode == 0, process.stderr
    assert "with 215,040 and 214,912 trainable parameters" in process.stdout
    compared = dict(COMPARED.findall(process.stdout.split("loss per answer token")[-1]))
    assert set(compared) == {*rows, "all"}
    written = json.loads((folder / "comparison.json").read_text())
    words = " ".join(process.stdout.split())
    assert all(sentence in words for sentence in written["verdicts"])
    for method in written["methods"]:
        assert list(method["seeds"]) == ["0", "1", "2"]
        losses = [scores["sum"]["loss"] for scores in method["seeds"].values()]
        assert len(set(losses)) == 3
        assert all(0 < loss < rows["sum"][2] for loss in losses), losses

    again = run_module(*arguments)
    assert again.returncode == 0
    assert again.stdout.count("already finished") == 1
    assert json.loads((folder / "comparison.json").read_text()) == written


@pytest.mark.parametrize(
    ("config", "message"),
    [("configs/tiny_mixlorra.py", "did you mean 'tiny_mixlora.py'?"), ("none.py", "no such file")],
)
def test_errors_are_one_line(tmp_path, config, message):
    process = run_module("moe_jax", "demo", "--output", tmp_path, "--config", config)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert message in process.stderr
