"""Figures of a run."""

import dataclasses
import json
import math

import numpy as np
import pytest
from tolerances import FLOAT64_ROUNDING

from moe_jax.adapters.lora.lora import LoraConfig
from moe_jax.config.classification import ClassificationConfig
from moe_jax.training.records.plots import draw_run, expert_map, loss_curves, loss_unit


def test_each_loss_has_a_curve(tmp_path):
    lines = [
        {"step": 10, "default/loss": 2.0, "default/grad_norm": 9.0},
        {"step": 10, "validation/default/held_out/loss": 3.0},
        {"step": 20, "default/loss": None},  # a loss that is not finite
        {"step": 30, "default/loss": 1.0},
        {"step": 30, "validation/default/held_out/loss": 2.5},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = loss_curves(file)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert drawn == {
        "training/default": [[10, 2.0], [30, 1.0]],
        "validation/default/held_out": [[10, 3.0], [30, 2.5]],
    }


def test_each_adapter_has_a_color(tmp_path):
    lines = [
        {"step": 10, "x/loss": 2.0, "y/loss": 4.0},
        {"step": 10, "validation/x/a/loss": 3.0, "validation/x/b/loss": 5.0},
        {"step": 20, "x/loss": 1.0, "y/loss": 3.0},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = loss_curves(file)
    x, x_mean, y = figure.axes[0].lines
    assert x.get_xydata().tolist() == [[10, 2.0], [20, 1.0]]
    assert x_mean.get_xydata().tolist() == [[10, 4.0]]
    assert y.get_xydata().tolist() == [[10, 4.0], [20, 3.0]]
    assert x.get_color() == x_mean.get_color() != y.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y"]


def test_each_unit_has_separate_axes(tmp_path):
    low_rank = LoraConfig(rank=2, alpha=4.0, target_modules=("q_proj",))
    labels, number = (
        dataclasses.replace(low_rank, classification=ClassificationConfig(glue=name))
        for name in ("cola", "stsb")
    )
    methods = {"x": low_rank, "cola": labels, "stsb": number, "y": low_rank}
    units = {name: loss_unit(method) for name, method in methods.items()}
    file = tmp_path / "metrics.jsonl"
    losses = {f"{name}/loss": 2.0 for name in methods}
    file.write_text(json.dumps({"step": 10, **losses}) + "\n")
    figure = loss_curves(file, units)
    assert {
        axes.get_ylabel(): [line.get_label() for line in axes.lines] for axes in figure.axes
    } == {
        "loss (nats per target token)": ["x", "y"],
        "loss (nats per row)": ["cola"],
        "loss (squared error)": ["stsb"],
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "y", "cola", "stsb"]


def test_expert_map_by_hand(tmp_path):
    load = np.array([[1.0, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0]])
    figure = expert_map(load, "a title", ["mlp/moe"])
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), load)
    texts = [text.get_text() for text in axes.texts]
    assert texts[4:6] == ["4.00", "0.00"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("expert", "layer")
    # Loads 0, 1, 2 and 4, the largest, are dark blue, white, light red and dark red.
    colors = {text.get_text(): text.get_color() for text in axes.texts}
    assert colors == {"1.00": "black", "4.00": "white", "0.00": "white", "2.00": "black"}
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_expert_map_of_several_routers_in_a_layer():
    nan = math.nan
    load = np.array([[1.0, 1, nan], [1, 1, 1], [2, 0, nan], [0, 1, 2]])
    axes = expert_map(load, "a title", ["mlp/up_proj", "self_attn/q_proj"]).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "mlp/up_proj 0",
        "mlp/up_proj 1",
        "self_attn/q_proj 0",
        "self_attn/q_proj 1",
    ]
    # Cells of absent experts are blank.
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert len(written) == 10
    assert (2, 0) not in written and (2, 2) not in written
    assert (written[0, 2], written[2, 3]) == ("2.00", "2.00")


def test_a_large_expert_map_has_no_numbers():
    axes = expert_map(np.ones((30, 8)), "a title", ["mlp/moe"]).axes[0]
    assert not axes.texts
    assert [text.get_text() for text in axes.get_yticklabels()] == [str(n) for n in range(30)]
    assert len(expert_map(np.ones((16, 8)), "a title", ["mlp/moe"]).axes[0].texts) == 128


def _loss_axes(tmp_path, losses):
    lines = [{"step": 10 * (n + 1), "x/loss": loss} for n, loss in enumerate(losses)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = loss_curves(file)
    figure.canvas.draw()
    return figure.axes[0]


@pytest.mark.parametrize(
    ("losses", "scale", "ticks"),
    [
        ([2.5, 1.3], "linear", {"1.4", "1.6", "1.8", "2.0", "2.2", "2.4"}),
        ([11.0, 1.3], "log", {"2", "5", "10"}),
        ([0.5, 0.004], "log", {"0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5"}),
        ([1.0, 0.0], "linear", {"0.0", "0.2", "0.4", "0.6", "0.8", "1.0"}),
    ],
)
def test_losses_have_plain_decimal_labels(tmp_path, losses, scale, ticks):
    axes = _loss_axes(tmp_path, losses)
    low, high = axes.get_ylim()
    labels = [
        text.get_text()
        for which in ("major", "minor")
        for text in axes.yaxis.get_ticklabels(which=which)
        if text.get_text() and low <= text.get_position()[1] <= high
    ]
    assert axes.get_yscale() == scale
    assert set(labels) == ticks and len(labels) == len(ticks)


def test_many_losses_are_smoothed(tmp_path):
    losses = np.random.default_rng(0).uniform(1.0, 2.0, 300).tolist()
    axes = _loss_axes(tmp_path, losses)
    raw, smoothed = axes.lines
    assert raw.get_ydata().tolist() == losses and raw.get_alpha() < 0.5
    expected = []
    for n in range(300):
        sides = min(7, n, 299 - n)  # 15 points, a twentieth
        near = losses[n - sides : n + sides + 1]
        expected.append(sum(near) / len(near))
    np.testing.assert_allclose(smoothed.get_ydata(), expected, **FLOAT64_ROUNDING)
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["training/x"]
    title = "training: moving average\nof 15 points"
    assert legend.get_title().get_text() == title
    assert raw.get_color() == smoothed.get_color()


def test_the_average_of_losses_that_fall_by_powers_of_ten_does_not_lag(tmp_path):
    losses = np.geomspace(8.0, 0.07, 40).tolist()
    axes = _loss_axes(tmp_path, losses)
    _, smoothed = axes.lines
    assert axes.get_yscale() == "log"
    np.testing.assert_allclose(smoothed.get_ydata(), losses, **FLOAT64_ROUNDING)


def test_few_losses_are_drawn_as_they_are(tmp_path):
    losses = np.geomspace(8.0, 0.07, 19).tolist()
    axes = _loss_axes(tmp_path, losses)
    (line,) = axes.lines
    assert line.get_ydata().tolist() == losses and line.get_alpha() is None
    assert not axes.get_legend().get_title().get_text()


def test_expert_maps_show_the_last_line(tmp_path):
    sites = {"x/sites": ["mlp/moe"]}
    lines = [
        {"step": 10, "x/loss": 2.0, "x/expert_load": [[2.0, 0.0]], **sites, "y/loss": 1.0},
        {"step": 20, "x/loss": 1.0, "x/expert_load": [[1.5, None]], **sites, "y/loss": 0.5},
        {"step": 20, "validation/x/held_out/loss": 3.0},
        {"step": 30, "y/loss": 0.5},  # 'x' has finished
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = draw_run(file, tmp_path)
    assert [path.name for path in drawn] == ["loss.png", "experts_x.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_lines_that_a_flipped_bit_left_valid_are_drawn(tmp_path):
    """A comma in place of a point divides a number; another letter makes another name."""
    file = tmp_path / "metrics.jsonl"
    good = {"a/expert_load": [[0.5, 1.5]], "a/sites": ["moe"], "a/loss": 1.0}
    ragged = {"a/expert_load": [[0.5, 1.5], [1.0]], "a/sites": ["moe"], "a/loss": 2.0}
    flat = {"a/expert_load": [0.5], "a/sites": ["moe"]}
    nameless = {"a/expert_load": [[0.0, 2.0]], "a/sitet": ["moe"], "b/loss": 3.0}
    measured = [{f"validation/{name}/{x}/loss": 2.0 for x in "xy"} for name in "ab"]
    renamed = {"validation/a/x/loss": 4.0, "validation/a/z/loss": 4.0, "validation/loss": 1.0}
    lines = [good, ragged, flat, nameless, *measured, renamed]
    numbered = [{"step": number, **line} for number, line in enumerate(lines)]
    file.write_text("".join(json.dumps(line) + "\n" for line in numbered))
    assert [drawn.name for drawn in draw_run(file, tmp_path)] == ["loss.png", "experts_a.png"]
    (axes,) = loss_curves(file).axes
    dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(line.get_xdata()) for line in dashed] == [[5]]  # of b; a has no step with x, y, z
