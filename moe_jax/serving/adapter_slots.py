"""The adapters of a call: which program computes them, and on which of its rows.

A program has slots, each for an adapter of one method and for a window of the rows. It takes any
adapters of these methods, so that their names, weights and number of rows need no compilation.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.adapters.method import AdapterMethod
from moe_jax.adapters.row_window import RowWindow
from moe_jax.adapters.rows import AdapterRows

SLOTS = 4
"""Largest number of adapters of one method in a call; more take turns."""


class SlotLayout(NamedTuple):
    """Static description of a program's rows and slots.

    Attributes:
      size: number of rows, B.
      methods: method of each slot; equal methods stand side by side.
      window: number of rows of each slot's window.
    """

    size: int
    methods: tuple[AdapterMethod, ...] = ()
    window: int = 0

    @property
    def adapter_rows(self) -> tuple[AdapterRows, ...]:
        """The slots as `adapter_rows` of a model that is called with windows."""
        return tuple(
            AdapterRows(slot_name(index), method, 0, self.window)
            for index, method in enumerate(self.methods)
        )


class FilledSlots(NamedTuple):
    """Adapters in the slots of a layout.

    Attributes:
      layout: the layout.
      adapters: name of the adapter in each slot; an empty slot has any adapter of its method.
      windows: window of each slot, by the slot's name.
      order: index in the call's rows of each given row.
    """

    layout: SlotLayout
    adapters: tuple[str, ...]
    windows: dict[str, RowWindow]
    order: tuple[int, ...]


def slot_name(index: int) -> str:
    """Name of a slot in `AdapterRows`."""
    return f"slot{index}"


def layouts(size: int, adapters: Mapping[str, AdapterMethod]) -> list[SlotLayout]:
    """The layouts of calls with `size` rows, the cheapest first.

    One without adapters; one slot for each method; and for calls of several adapters, one with
    slots for all, once with narrow windows for calls that share their rows evenly.

    Args:
      size: number of rows.
      adapters: method of each loaded adapter.
    """
    counts = _slots_of_methods(adapters)
    several = tuple(
        itertools.chain.from_iterable(
            [method] * min(count, size) for method, count in counts.items()
        )
    )
    found = [SlotLayout(size), *(SlotLayout(size, (method,), size) for method in counts)]
    if len(several) > 1 and size > 1:
        if size >= SLOTS:
            found.append(SlotLayout(size, several, size // SLOTS))
        found.append(SlotLayout(size, several, size))
    return found


def fill_slots(
    known: Sequence[SlotLayout], adapters: Mapping[str, AdapterMethod], names: Sequence[str | None]
) -> FilledSlots:
    """The first layout that holds these rows, filled with their adapters.

    Args:
      known: layouts of one size, see `layouts`.
      adapters: method of each loaded adapter.
      names: adapter of each row, at most `size` of them and `SLOTS` adapters of a method; None is
        the base.
    """
    present = [name for name in adapters if name in names]
    for layout in known:
        filled = _fill(layout, adapters, names, present)
        if filled is not None:
            return filled
    raise ValueError(f"no layout of {known} holds the adapters {present}")


def take_turns(
    adapters: Mapping[str, AdapterMethod], names: Sequence[str | None], size: int
) -> list[list[int]]:
    """Divides rows into calls of at most `size` rows and `SLOTS` adapters of a method.

    Args:
      adapters: method of each loaded adapter.
      names: adapter of each row; None is the base.
      size: largest number of rows of a call.

    Returns:
      Indices of the rows of each call.
    """
    calls: list[list[int]] = []
    current: list[int] = []
    in_call: dict[AdapterMethod, set[str]] = {}
    by_adapter = sorted(range(len(names)), key=lambda row: (names[row] is not None, names[row]))
    for row in by_adapter:
        name = names[row]
        used = set[str]() if name is None else in_call.setdefault(adapters[name], set())
        is_full = name is not None and name not in used and len(used) == SLOTS
        if current and (is_full or len(current) == size):
            calls.append(current)
            current, in_call = [], {}
            used = set[str]() if name is None else in_call.setdefault(adapters[name], set())
        current.append(row)
        if name is not None:
            used.add(name)
    return [*calls, current] if current else calls


def _slots_of_methods(adapters: Mapping[str, AdapterMethod]) -> dict[AdapterMethod, int]:
    counts: dict[AdapterMethod, int] = {}
    for method in adapters.values():
        counts[method] = min(counts.get(method, 0) + 1, SLOTS)
    return counts


def _fill(
    layout: SlotLayout,
    adapters: Mapping[str, AdapterMethod],
    names: Sequence[str | None],
    present: Sequence[str],
) -> FilledSlots | None:
    """The filled layout; None if it does not hold the rows."""
    # The rows of the base come first, then those of each adapter side by side.
    rows = sorted(
        range(len(names)),
        key=lambda row: 0 if (name := names[row]) is None else 1 + present.index(name),
    )
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        name = names[row]
        if name is not None:
            places.setdefault(name, []).append(place)
    slot_adapters: list[str | None] = [None] * len(layout.methods)
    windows: dict[str, RowWindow] = {}
    for name in present:
        own = places[name]
        for start in range(0, len(own), max(layout.window, 1)):
            free = [
                slot
                for slot, method in enumerate(layout.methods)
                if method == adapters[name] and slot_adapters[slot] is None
            ]
            if not free:
                return None
            part = own[start : start + layout.window]
            slot_adapters[free[0]] = name
            windows[slot_name(free[0])] = _window(layout, part[0], len(part))
    for slot, method in enumerate(layout.methods):
        if slot_adapters[slot] is None:
            slot_adapters[slot] = next(n for n in adapters if adapters[n] == method)
            windows[slot_name(slot)] = _window(layout, 0, 0)
    order = [0] * len(rows)
    for place, row in enumerate(rows):
        order[row] = place
    return FilledSlots(layout, tuple(map(str, slot_adapters)), windows, tuple(order))


def _window(layout: SlotLayout, start: int, count: int) -> Any:
    """Window with `count` rows of an adapter from `start` on."""
    first = min(start, layout.size - layout.window)
    places = np.arange(layout.window) + first
    return RowWindow(np.int32(first), (places >= start) & (places < start + count))
