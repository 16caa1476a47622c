"""Adapters in the slots of a call, worked out by hand."""

import numpy as np
import pytest
from foreign_adapters import LORA, MIXLORA

from moe_jax.adapters import METHODS
from moe_jax.config.parse import parse_member
from moe_jax.serving.adapter_slots import SlotLayout, fill_slots, layouts, take_turns

LORA_METHOD = parse_member(METHODS, LORA, "method")
MIX_METHOD = parse_member(METHODS, MIXLORA, "method")
ADAPTERS = {"a": LORA_METHOD, "b": MIX_METHOD, "c": LORA_METHOD}


def test_layouts_depend_on_methods_and_not_on_names():
    several = (LORA_METHOD, LORA_METHOD, MIX_METHOD)
    assert layouts(16, ADAPTERS) == [
        SlotLayout(16),
        SlotLayout(16, (LORA_METHOD,), 16),
        SlotLayout(16, (MIX_METHOD,), 16),
        SlotLayout(16, several, 4),
        SlotLayout(16, several, 16),
    ]
    assert layouts(4, ADAPTERS)[3:] == [SlotLayout(4, several, 1), SlotLayout(4, several, 4)]
    assert layouts(1, ADAPTERS) == [
        SlotLayout(1),
        SlotLayout(1, (LORA_METHOD,), 1),
        SlotLayout(1, (MIX_METHOD,), 1),
    ]
    many = {f"adapter {n}": LORA_METHOD for n in range(9)}
    assert layouts(16, many)[-1] == SlotLayout(16, (LORA_METHOD,) * 4, 16)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ([None, None], 0),
        (["c", None, "c"], 1),
        (["b"], 2),
        (["a", "b", None, "c", "a"], 3),
        (["a"] * 5 + ["b"], 3),  # five rows of `a` in both slots of its method
        (["a"] * 5 + ["b", "c"], 4),
        ([None] * 9 + ["b"] * 5 + ["c"] * 2, 4),
    ],
)
def test_windows_hold_the_rows_of_their_adapters(names, layout):
    known = layouts(16, ADAPTERS)
    filled = fill_slots(known, ADAPTERS, names)
    assert filled.layout == known[layout]
    assert sorted(filled.order) == list(range(len(names)))
    found = {}
    for slot, (name, method) in enumerate(zip(filled.adapters, filled.layout.methods, strict=True)):
        window = filled.windows[f"slot{slot}"]
        assert ADAPTERS[name] == method
        assert window.mask.shape == (filled.layout.window,)
        assert 0 <= window.first <= 16 - filled.layout.window
        for place in window.first + np.flatnonzero(window.mask):
            assert place not in found
            found[int(place)] = name
    expected = {
        place: name for name, place in zip(names, filled.order, strict=True) if name is not None
    }
    assert found == expected


def test_more_adapters_than_slots_take_turns():
    adapters = {f"x{n}": LORA_METHOD for n in range(6)} | {"b": MIX_METHOD}
    names = ["x5", None, "x0", "x1", "b", "x2", "x3", "x4", "x0"]
    calls = take_turns(adapters, names, 16)
    assert [sorted({names[i] or "" for i in call}) for call in calls] == [
        ["", "b", "x0", "x1", "x2", "x3"],
        ["x4", "x5"],
    ]
    assert sorted(i for call in calls for i in call) == list(range(9))
    assert [len(call) for call in take_turns(adapters, [None] * 5, 2)] == [2, 2, 1]
    assert take_turns(adapters, [], 2) == []
