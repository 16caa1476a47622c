"""FLOPs and bytes moved of a compiled program, with all iterations of its loops.

`Compiled.cost_analysis` counts one iteration of a loop, such as the scan over layers. Here the body
of each loop is analyzed separately and multiplied by its trip count. Needs jax only.
"""

import functools
import re
from typing import NamedTuple

import jax
from jaxlib import xla_client

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LOOP = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r" s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(.*direction=LT")
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_METADATA = re.compile(r', metadata=\{(?:[^"}]|"[^"]*")*\}')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Loop(NamedTuple):
    """A loop of a program.

    Attributes:
      trips: trip count; None if the compiler does not know it.
      body: name of the computation of the body.
    """

    trips: int | None
    body: str


class Flops(NamedTuple):
    """FLOPs of one run of a program.

    Attributes:
      total: FLOPs of all iterations of all loops.
      unknown_loops: number of loops of unknown trip count, counted as one iteration.
      moved: bytes read and written. A fusion reads its inputs and writes its results once; caches
        may reduce the traffic to memory.
    """

    total: float
    unknown_loops: int
    moved: float


def compiled_flops(compiled: jax.stages.Compiled, *, fixed_loops: bool = False) -> Flops:
    """Counts FLOPs and bytes of a program on one device with XLA, over all iterations of loops.

    Custom kernels, such as cuDNN's fused attention, are not counted.

    Args:
      compiled: compiled program.
      fixed_loops: True if all loops are `scan` or `fori_loop` with fixed bounds, which count from 0
        in steps of 1. The trip count is then read from the loop's condition if the compiler does
        not give it (as on TPUs).
    """
    client = jax.devices()[0].client
    analysis = xla_client._xla.hlo_module_cost_analysis
    text = compiled.as_text()
    assert text is not None
    computations, entry = _computations(text)

    @functools.cache
    def once(name: str) -> tuple[float, float]:
        """FLOPs and bytes of a computation by XLA, with one iteration of each loop."""
        # Each computation follows those that it calls.
        before = list(computations.values())[: list(computations).index(name)]
        module = "\n\n".join(["HloModule counted", *before, f"ENTRY {computations[name]}"])
        counts = analysis(client, xla_client.hlo.hlo_module_from_text(module))
        return float(counts["flops"]), float(counts["bytes accessed"])

    unknown = 0

    @functools.cache
    def total(name: str) -> tuple[float, float]:
        """FLOPs and bytes of a computation, with all iterations of each loop."""
        nonlocal unknown
        flops, moved = once(name)
        for loop in _loops(computations, name, fixed_loops):
            unknown += loop.trips is None
            rounds = 1 if loop.trips is None else loop.trips
            (all_flops, all_moved), (one_flops, one_moved) = total(loop.body), once(loop.body)
            flops += rounds * all_flops - one_flops
            moved += rounds * all_moved - one_moved
        return flops, moved

    flops, moved = total(entry)
    return Flops(flops, unknown, moved)


def _computations(text: str) -> tuple[dict[str, str], str]:
    """Splits the text into computations by name, without `ENTRY`; also returns the entry's name."""
    text = _METADATA.sub("", text)  # it refers to tables that the shorter module lacks
    computations: dict[str, str] = {}
    entry, name, lines = "", "", list[str]()
    for line in text.splitlines():
        head = _HEAD.match(line)
        if not name and head:
            name, lines = head[1], [line.removeprefix("ENTRY ")]
            entry = name if line.startswith("ENTRY ") else entry
        elif name:
            is_end = line.startswith("}")  # the kind of core may follow
            lines.append("}" if is_end else line)
            if is_end:
                computations[name], name = "\n".join(lines), ""
    return computations, entry


def _loops(computations: dict[str, str], name: str, fixed_loops: bool) -> list[Loop]:
    """Loops of a computation and of those that it calls, without the loops nested in them."""
    loops: list[Loop] = []
    for line in computations[name].splitlines():
        loop = _LOOP.search(line)
        if loop:
            trips = _TRIPS.search(line)
            count = int(trips[1]) if trips else None
            if count is None and fixed_loops:
                count = _limit(computations, loop[1])
            loops.append(Loop(count, loop[2]))
            continue
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().removeprefix("%") for branch in branches.split(",")]
        for other in called:
            loops += _loops(computations, other, fixed_loops)
    return loops


def _limit(computations: dict[str, str], name: str) -> int | None:
    """N, if the loop's condition compares its counter with the constant N; else None."""
    condition = computations[name]
    limits = _LIMIT.findall(condition)
    fused = (computations[called] for called in _CALLED.findall(condition))
    is_below = any(_BELOW.search(text) for text in (condition, *fused))
    return int(limits[0]) if len(limits) == 1 and is_below else None
