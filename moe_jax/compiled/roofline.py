"""Roofline model of the time of a compiled GPU or TPU program, from its optimized HLO text.

The time of a kernel is the maximum of the times of its FLOPs and of the bytes that it reads and
writes, plus a constant for its launch. That of a collective operation is the time of the bytes that
a chip sends around a ring. Kernels run one after another, and the body of a loop runs once for each
iteration. The figures are estimates that rank programs for the same chip. The model ignores the L2
cache, overlap of copies and collectives with computation, CUDA graphs, and kernels below the given
rates; of a TPU, arrays in its fast memory are free. FLOPs are those of matrix products, of cuDNN's
attention, and of Pallas kernels whose metadata states `flops` and `bytes`. Pure Python, without
jax.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from moe_jax.compiled.chips import Rates
from moe_jax.compiled.hlo import Computation, Instruction, Module, parse_module, root
from moe_jax.compiled.kernel_bytes import (
    COLLECTIVES,
    bytes_moved,
    bytes_moved_by_fusion,
    bytes_sent,
    without_workspace,
)
from moe_jax.compiled.kernel_flops import attention_flops, product_sizes

Key = TypeVar("Key", bound=Hashable)

LARGE_PRODUCT = "large product"
THIN_PRODUCT = "thin product"
ATTENTION = "attention"
ATTENTION_BACKWARD = "attention backward"
COLLECTIVE = "collective"
PALLAS = "Pallas kernel"
THIN = 512
"""Maximum of the smallest of a thin product's three sizes, such as the rank of adapters."""


class Kernel(NamedTuple):
    """A kernel of the program, or a library call that launches one.

    Attributes:
      kind: kind of the kernel: product, attention, or type of XLA's fusion.
      launches: number of launches in one run of the program.
      flops: FLOPs of one launch.
      moved: bytes read and written by one launch.
      seconds: estimated seconds of one launch.
      result: type of the result.
      origin: JAX operation of the kernel, with the enclosing modules.
    """

    kind: str
    launches: int
    flops: float
    moved: float
    seconds: float
    result: str
    origin: str


class Totals(NamedTuple):
    """Sums over all launches of kernels.

    Attributes:
      kernels: number of launches.
      flops: FLOPs.
      moved: bytes read and written.
      seconds: estimated seconds.
    """

    kernels: int
    flops: float
    moved: float
    seconds: float


class Roofline(NamedTuple):
    """Estimate of one run of a program.

    Attributes:
      kernels: kernels in the order of the program.
      unknown_loops: number of loops of unknown trip count, counted as one iteration.
    """

    kernels: list[Kernel]
    unknown_loops: int

    @property
    def total(self) -> Totals:
        """Totals of all kernels."""
        return totals(self.kernels)

    @property
    def kinds(self) -> dict[str, Totals]:
        """Totals by kind of kernel, the longest first."""
        return grouped(self.kernels, lambda kernel: kernel.kind)


def totals(kernels: Iterable[Kernel]) -> Totals:
    """Sums the figures of kernels over their launches."""
    kernels = list(kernels)
    return Totals(
        kernels=sum(kernel.launches for kernel in kernels),
        flops=sum(kernel.launches * kernel.flops for kernel in kernels),
        moved=sum(kernel.launches * kernel.moved for kernel in kernels),
        seconds=sum(kernel.launches * kernel.seconds for kernel in kernels),
    )


def grouped(kernels: Iterable[Kernel], key: Callable[[Kernel], Key]) -> dict[Key, Totals]:
    """Totals of the kernels with equal `key`, the longest first."""
    groups: dict[Key, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(key(kernel), []).append(kernel)
    sums = {name: totals(group) for name, group in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].seconds))


def roofline(text: str, rates: Rates) -> Roofline:
    """Estimates the time of a program on one chip.

    Args:
      text: optimized program from `Compiled.as_text`.
      rates: rates of the chip.
    """
    module = parse_module(text)
    launched = list(_launched(module, module.entry, 1))
    kernels = [
        _kernel(module, computation, instruction, launches, rates)
        for computation, instruction, launches in launched
    ]
    unknown = sum(
        instruction.opcode == "while" and _trips(module, instruction) is None
        for computation in module.computations.values()
        for instruction in computation.values()
    )
    return Roofline(kernels, unknown)


# Opcodes without time on the chip: they name buffers or wait for asynchronous operations.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all optimization-barrier "
    "partition-id replica-id".split()
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_STATED = re.compile(
    r'serialized_metadata = "\{\\22flops\\22: \\22(\d+)\\22, \\22bytes\\22: \\22(\d+)'
)
_FUSION = re.compile(r"\bkind=k(\w+)")


def _trips(module: Module, loop: Instruction) -> int | None:
    """Number of rounds of a loop; None if it is unknown.

    TPU programs do not state it. There it is N if the condition compares a counter with the
    constant N alone, as that of a scan does, whose counter starts at 0.
    """
    found = _TRIPS.search(loop.attributes)
    if found:
        return int(found[1])
    condition = module.computations[loop.condition] if loop.condition else {}
    called = (module.computations[name] for inner in condition.values() for name in inner.called)
    inside = [inner for body in (condition, *called) for inner in body.values()]
    limits = [inner.literal for inner in inside if inner.opcode == "constant"]
    is_below = any(
        inner.opcode == "compare" and "direction=LT" in inner.attributes for inner in inside
    )
    return int(limits[0]) if is_below and len(limits) == 1 and limits[0].isdigit() else None


def _launched(
    module: Module, name: str, launches: int
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields the kernels of a computation with their computation and number of launches."""
    computation = module.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if (
            opcode in _FREE
            or opcode.endswith("-done")
            or "AllocateBuffer" in instruction.attributes
        ):
            continue
        if opcode == "while":
            rounds = launches * (_trips(module, instruction) or 1)
            for called in instruction.called:
                yield from _launched(module, called, rounds)
        elif opcode in ("call", "async-start"):
            for called in instruction.called:
                yield from _launched(module, called, launches)
        elif opcode == "conditional":
            # The branch is unknown: the one with the most launches is counted.
            branches = [list(_launched(module, called, launches)) for called in instruction.called]
            yield from max(branches, key=lambda branch: sum(times for _, _, times in branch))
        else:
            yield computation, instruction, launches


def _kernel(
    module: Module, computation: Computation, instruction: Instruction, launches: int, rates: Rates
) -> Kernel:
    body = _body(module, instruction)
    moved = bytes_moved_by_fusion(body) if body else bytes_moved(computation, instruction)
    kind, flops, source = _work(body or computation, instruction, is_fusion=body is not None)
    stated = _STATED.search(instruction.attributes)
    if stated:
        kind, (flops, moved) = PALLAS, map(float, stated.groups())
    rate = {
        ATTENTION: rates.attention,
        ATTENTION_BACKWARD: rates.attention_backward,
    }.get(kind, rates.product)
    seconds = max(flops / rate, moved / rates.memory) + rates.launch
    if kind == COLLECTIVE:
        seconds += bytes_sent(computation, instruction) / rates.link
    result = _result(root(body) if body else instruction)
    return Kernel(kind, launches, flops, moved, seconds, result, source.origin)


def _body(module: Module, instruction: Instruction) -> Computation | None:
    """Computation of a fusion; None for other instructions."""
    is_fusion = instruction.opcode in ("fusion", "fusion-start")
    return module.computations[instruction.called[0]] if is_fusion else None


def _result(instruction: Instruction) -> str:
    """Readable type of a result, without layouts and workspaces."""
    arrays = without_workspace(instruction.arrays)
    return " ".join(f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in arrays)


def _work(
    scope: Computation, instruction: Instruction, *, is_fusion: bool
) -> tuple[str, float, Instruction]:
    """Returns the kind of a kernel, its FLOPs, and the instruction with its origin.

    Args:
      scope: body of a fusion, or the computation of the instruction.
      instruction: instruction of the kernel.
      is_fusion: True if `scope` is the body of a fusion.
    """
    for inner in scope.values() if is_fusion else [instruction]:
        sizes = product_sizes(scope, inner)
        if sizes:
            batch, *sides = sizes
            kind = THIN_PRODUCT if min(sides) <= THIN else LARGE_PRODUCT
            return kind, 2.0 * batch * math.prod(sides), inner
    target = _TARGET.search(instruction.attributes)
    if target and "fmha" in target[1]:
        flops = attention_flops(scope, instruction)
        if "Backward" in target[1]:
            # Five products instead of two: the recomputed scores and four gradients.
            return ATTENTION_BACKWARD, 2.5 * flops, instruction
        return ATTENTION, flops, instruction
    return _plain_kind(instruction), 0.0, instruction


def _plain_kind(instruction: Instruction) -> str:
    """Kind of a kernel without matrix products."""
    opcode, attributes = instruction.opcode, instruction.attributes
    if opcode.removesuffix("-start") in COLLECTIVES:
        return COLLECTIVE
    if opcode == "custom-call":
        target = _TARGET.search(attributes)
        return target[1] if target else opcode
    if opcode in ("fusion-start", "copy-start"):
        return "asynchronous copy"
    if opcode != "fusion":
        return opcode
    if "__triton" in attributes:
        return "Triton fusion"
    kind = _FUSION.search(attributes)
    names = {"Loop": "elementwise", "Input": "reduction"}
    return names.get(kind[1] if kind else "", "other fusion")
