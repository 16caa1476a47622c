"""Choice of the number of micro-batches by the memory of a device."""

import types

import pytest

from moe_jax.training.run import defaults

ROWS = 16


def chosen(monkeypatch, free, memory):
    """Number of micro-batches and notes if a step with `rows` in each needs `memory(rows)`."""
    compiled = []

    def plan(program, row_length):
        compiled.append(program)
        return types.SimpleNamespace(peak=memory(ROWS // program))

    monkeypatch.setattr(defaults, "free_memory", lambda: free)
    monkeypatch.setattr(defaults, "memory_plan", plan)
    # The program is the number of micro-batches alone.
    monkeypatch.setattr(defaults, "parse_run_config", lambda raw, _: raw["training"])
    monkeypatch.setattr(defaults, "build_program", lambda training, *_: training["micro_batches"])
    config = {
        "adapters": {"default": {"data": {"max_length": 8}}},
        "training": {"micro_batches": 1},
    }
    notes = defaults._fit_memory(config, types.SimpleNamespace(config=None))
    return config["training"]["micro_batches"], notes, compiled


@pytest.mark.parametrize(
    ("free", "micro_batches", "compiled"),
    [
        (300, 1, [1]),  # 0.9 x 300 = 270; 100 + 10 a row is 260
        (250, 2, [1, 16, 2]),  # 225; 180 for 8 rows
        (180, 4, [1, 16, 4]),  # 162; 140 for 4 rows
        (140, 8, [1, 16, 8]),  # 126; 120 for 2 rows
        (130, 16, [1, 16]),  # 117; 110 for 1 row
    ],
)
def test_as_few_as_fit(monkeypatch, free, micro_batches, compiled):
    assert chosen(monkeypatch, free, lambda rows: 100 + 10 * rows) == (micro_batches, [], compiled)


def test_a_prediction_that_is_too_low_is_corrected(monkeypatch):
    # The line from 260 for 16 rows to 110 for one gives 180 for 8, which need 230.
    memory = {16: 260, 8: 230, 4: 140, 1: 110}
    assert chosen(monkeypatch, 250, memory.__getitem__) == (4, [], [1, 16, 2, 4])


def test_a_step_that_never_fits_is_reported(monkeypatch):
    count, (note,), compiled = chosen(monkeypatch, 2**30, lambda rows: (1 + rows) * 2**30)
    assert (count, compiled) == (16, [1, 16])
    assert note.startswith("warning: a step needs 2.00 GiB of a device, and 1.00 GiB are free: try")


def test_unknown_memory_compiles_nothing(monkeypatch):
    assert chosen(monkeypatch, None, lambda rows: rows) == (1, [], [])
