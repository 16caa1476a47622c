import json

import numpy as np

from moe_jax.training.plots import draw_run, expert_map, loss_curves


def test_each_loss_is_a_line(tmp_path):
    lines = [
        {"step": 10, "default/loss": 2.0, "default/grad_norm": 9.0},
        {"step": 10, "validation/default/held_out/loss": 3.0},
        {"step": 20, "default/loss": None},  # what a loss that is not finite is written as
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


def test_map_shows_load_relative_to_an_equal_share(tmp_path):
    load = np.array([[1.0, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0]])
    figure = expert_map(load, "a title")
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), load)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[4:6] == ["4.00", "0.00"]
    figure.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_drawn_from_its_last_line(tmp_path):
    lines = [
        {"step": 10, "x/loss": 2.0, "x/expert_load": [[2.0, 0.0]], "y/loss": 1.0},
        {"step": 20, "x/loss": 1.0, "x/expert_load": [[1.5, 0.5]], "y/loss": 0.5},
        {"step": 20, "validation/x/held_out/loss": 3.0},
    ]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = draw_run(file, tmp_path)
    assert [path.name for path in drawn] == ["loss.png", "experts_x.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
