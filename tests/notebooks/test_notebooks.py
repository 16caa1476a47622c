"""Runs each notebook from start to end in its own kernel, and checks how they are stored."""

import base64
import json
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from xla_flags import xla_flags

import moe_jax
from moe_jax import demo

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ("own_rows", "quick_start", "routing_tour")
SECONDS = 600
"""Limit for one cell, on the slowest machine."""

# Cells that run after the last one of each notebook and print its results as JSON.
RESULT_CELLS = {
    "own_rows": """
lines = [json.loads(l) for l in (OUTPUT / "run" / "metrics.jsonl").read_text().splitlines()]
print(json.dumps({
    "losses": [line["mine/loss"] for line in lines if "mine/loss" in line],
    "expected": list(FACTS.values()),
    "before": before,
    "after": after,
    "conversation": conversation,
    "exported": sorted(path.name for path in (OUTPUT / "exported").iterdir()),
}))
""",
    "quick_start": """
import json
losses = {}
for line in (OUTPUT / "run" / "metrics.jsonl").read_text().splitlines():
    for key, value in json.loads(line).items():
        if key.startswith("validation/"):
            losses.setdefault(key, []).append(value)
print(json.dumps({
    "losses": losses,
    "right": right,
    "questions": len(held_out),
    "lengths": [min(lengths), max(lengths)],
    "folders": [sorted(path.name for path in folder.iterdir())],
}))
""",
    "routing_tour": """
import json
print(json.dumps({
    "parameters": {name: moe_jax.parameter_count(a.tree) for name, a in adapters.items()},
    "losses": {n: {t: s.loss for t, s in each.items()} for n, each in scores.items()},
    "validation": result.validation,
    "load": report.total.load.tolist(),
    "bits": [before.specialisation.tolist(), report.specialisation.tolist()],
    "rise": rise.tolist(),
    "page": len(page),
}))
""",
}


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def run(name, folder, **parameters):
    """The executed notebook, and the results that its `RESULT_CELLS` entry printed."""
    notebook = read(name)
    (position,) = [
        n for n, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])
    ]
    given = "\n".join(f"{parameter} = {value!r}" for parameter, value in parameters.items())
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(given))
    notebook.cells.append(nbformat.v4.new_code_cell(RESULT_CELLS[name]))
    # A user's machine: one device.
    environment = {**os.environ, "XLA_FLAGS": xla_flags(devices=1)}
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    return notebook, json.loads(notebook.cells[-1].outputs[0].text)


@pytest.fixture(autouse=True)
def clean_jupyter(tmp_path_factory, monkeypatch):
    """Selects the kernel of this environment, without any settings of the user."""
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path_factory.mktemp("jupyter")))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))


def outputs(notebook, kind):
    return [
        output.data[kind]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if kind in output.get("data", {})
    ]


def pictures(notebook):
    found = [base64.b64decode(text) for text in outputs(notebook, "image/png")]
    assert all(picture.startswith(b"\x89PNG") for picture in found)
    return found


def test_quick_start_learns(tmp_path):
    notebook, found = run("quick_start", tmp_path, STEPS=40)
    assert len(found["losses"]) == 6
    # Each is measured at step 0, when the base has not seen a question.
    assert all(values[-1] < values[0] / 3 for values in found["losses"].values()), found["losses"]
    assert found["questions"] == 120
    assert found["right"]["base"] == [0.0] * 6
    assert max(found["right"]["mixlora"]) > 0
    assert found["lengths"][1] <= 24
    assert "adapter.json" in found["folders"][0]
    assert len(pictures(notebook)) == 3  # lengths, losses, right answers
    tables = outputs(notebook, "text/html")
    assert len(tables) == 2
    assert "Write the plural." in tables[0]
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_routing_tour_inspects_the_trained_adapter(tmp_path):
    notebook, found = run("routing_tour", tmp_path, STEPS=24)
    assert found["parameters"] == {"lora": 214_912, "mixlora": 215_040}
    for name, losses in found["losses"].items():
        assert losses == {
            task: pytest.approx(found["validation"][f"{name}/{task}"], rel=1e-4) for task in losses
        }
    # Loads are multiples of an equal share: four experts' add up to 4 in each of four layers.
    assert [sum(layer) for layer in found["load"]] == pytest.approx([4.0] * 4)
    untrained, trained = found["bits"]
    assert untrained != trained
    assert all(0 <= bits <= 2.6 for bits in untrained + trained)
    # By layer, expert and task: some expert matters, and not all of them equally.
    rise = np.array(found["rise"])
    assert rise.shape == (4, 4, 6)
    assert rise.max() > 0.01
    assert rise.std() > 0.001
    # Losses, bars, load, load by task, yardstick, co-activation, entropy, ablation.
    assert len(pictures(notebook)) == 8
    (frame,) = [text for text in outputs(notebook, "text/html") if "<iframe" in text]
    assert len(frame) > found["page"] > 20_000


def test_own_rows_are_learned_and_answered(tmp_path):
    # The demo's base in place of the hub's model. It has not seen these capital letters, and its
    # frozen head cannot tell them apart, so that answers are compared from their second letter on.
    notebook, found = run("own_rows", tmp_path, STEPS=120, BASE=str(demo.BASE))
    assert found["losses"][-1] < found["losses"][0] / 10, found["losses"]
    after, expected = ([text.strip()[1:] for text in found[key]] for key in ("after", "expected"))
    assert sum(map(str.__eq__, after, expected)) >= 3, after
    before = [text.strip()[1:] for text in found["before"]]
    assert not set(before) & set(expected)
    turns = found["conversation"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    assert all(turn["content"] for turn in turns)
    assert "adapter_config.json" in found["exported"]
    assert len(pictures(notebook)) == 1  # losses


PUBLIC = re.compile(r"^(?:import|from) (moe_jax[\w.]*)(?: import (.+))?$", re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_imports_public_names_only(name):
    code = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "code")
    imports = PUBLIC.findall(code)
    assert imports
    for module, names in imports:
        assert module in ("moe_jax", "moe_jax.demo")
        assert set(filter(None, names.split(", "))) <= {*moe_jax.__all__, *demo.__all__, "demo"}
    assert set(re.findall(r"\bmoe_jax\.(\w+)", code)) <= {*moe_jax.__all__, "demo"}


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, "clear all outputs"
    # No trace of the machine on which it was last opened.
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name):
    for cell in read(name).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)]+)\)", cell.source):
                assert (NOTEBOOKS / target).exists(), target


def test_every_notebook_runs():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(NAMES)
