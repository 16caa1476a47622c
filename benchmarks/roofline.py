"""Roofline model of the time of a compiled GPU program, from its optimized HLO text.

The time of a kernel is the maximum of the times of its FLOPs and of the bytes that it reads and
writes, plus a constant for its launch. Kernels run one after another, and the body of a loop runs
once for each iteration. The figures are estimates that rank programs for the same chip. The model
ignores the L2 cache, overlap of copies with computation, CUDA graphs, and kernels below the given
rates. FLOPs are those of matrix products and of cuDNN's attention. Pure Python, without jax.
"""

import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from benchmarks.hlo_text import Array, Computation, Instruction, Module, parse_module

Key = TypeVar("Key", bound=Hashable)

LARGE_PRODUCT = "large product"
THIN_PRODUCT = "thin product"
ATTENTION = "attention"
ATTENTION_BACKWARD = "attention backward"
THIN = 512
"""Maximum of the smallest of a thin product's three sizes, such as the rank of adapters."""


class Rates(NamedTuple):
    """Achievable rates of a GPU.

    Attributes:
      product: FLOP/s of a large matrix product in bfloat16.
      attention: FLOP/s of cuDNN's attention, forward.
      attention_backward: FLOP/s of cuDNN's attention, backward.
      memory: bytes/s to and from memory.
      launch: seconds of a kernel's launch.
    """

    product: float
    attention: float
    attention_backward: float
    memory: float
    launch: float


# About 80% of the peak of dense products and 90% of the memory's peak, as usual for large kernels.
# The rates of attention are assumptions.
H200 = Rates(
    product=790e12, attention=500e12, attention_backward=400e12, memory=4.3e12, launch=2e-6
)


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


def roofline(text: str, rates: Rates = H200) -> Roofline:
    """Estimates the time of a program on one GPU.

    Args:
      text: optimized program from `Compiled.as_text`.
      rates: rates of the GPU.
    """
    module = parse_module(text)
    launched = list(_launched(module, module.entry, 1))
    kernels = [
        _kernel(module, computation, instruction, launches, rates)
        for computation, instruction, launches in launched
    ]
    unknown = sum(
        instruction.opcode == "while" and _trips(instruction) is None
        for computation in module.computations.values()
        for instruction in computation.values()
    )
    return Roofline(kernels, unknown)


# Opcodes without time on the GPU: they name buffers or wait for asynchronous operations.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all optimization-barrier "
    "partition-id replica-id".split()
)
# These opcodes read only a part of their operand.
_SLICES = ("slice", "dynamic-slice", "gather")
# The last array of a library call's result, if of bytes, is its workspace.
_WORKSPACES = ("s8", "u8")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_FUSION = re.compile(r"\bkind=k(\w+)")


def _trips(loop: Instruction) -> int | None:
    found = _TRIPS.search(loop.attributes)
    return int(found[1]) if found else None


def _launched(
    module: Module, name: str, launches: int
) -> Iterator[tuple[Computation, Instruction, int]]:
    """Yields the kernels of a computation with their computation and number of launches."""
    computation = module.computations[name]
    for instruction in computation.values():
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            continue
        if opcode == "while":
            rounds = launches * (_trips(instruction) or 1)
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
    moved = _moved_by_fusion(body) if body else _moved(computation, instruction)
    kind, flops, source = _work(body or computation, instruction, is_fusion=body is not None)
    rate = {
        ATTENTION: rates.attention,
        ATTENTION_BACKWARD: rates.attention_backward,
    }.get(kind, rates.product)
    seconds = max(flops / rate, moved / rates.memory) + rates.launch
    result = _result(_root(body) if body else instruction)
    return Kernel(kind, launches, flops, moved, seconds, result, source.origin)


def _body(module: Module, instruction: Instruction) -> Computation | None:
    """Computation of a fusion; None for other instructions."""
    is_fusion = instruction.opcode in ("fusion", "fusion-start")
    return module.computations[instruction.called[0]] if is_fusion else None


def _root(body: Computation) -> Instruction:
    return next(instruction for instruction in body.values() if instruction.is_root)


def _result(instruction: Instruction) -> str:
    """Readable type of a result, without layouts and workspaces."""
    arrays = instruction.arrays
    if len(arrays) > 1 and arrays[-1].dtype in _WORKSPACES:
        arrays = arrays[:-1]
    return " ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in arrays)


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
        sizes = _product_sizes(scope, inner)
        if sizes:
            batch, *sides = sizes
            kind = THIN_PRODUCT if min(sides) <= THIN else LARGE_PRODUCT
            return kind, 2.0 * batch * math.prod(sides), inner
    target = _TARGET.search(instruction.attributes)
    if target and "fmha" in target[1]:
        flops = _attention_flops(scope, instruction)
        if "Backward" in target[1]:
            # Five products instead of two: the recomputed scores and four gradients.
            return ATTENTION_BACKWARD, 2.5 * flops, instruction
        return ATTENTION, flops, instruction
    return _plain_kind(instruction), 0.0, instruction


def _plain_kind(instruction: Instruction) -> str:
    """Kind of a kernel without matrix products."""
    opcode, attributes = instruction.opcode, instruction.attributes
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


def _product_sizes(scope: Computation, instruction: Instruction) -> list[int] | None:
    """Batch, rows, columns and contracted size of a matrix product; None for other instructions."""
    attributes = instruction.attributes
    if instruction.opcode == "dot":
        pattern = r"\b{}_dims=\{{([^}}]*)\}}"
    elif instruction.opcode == "custom-call" and "gemm_backend_config" in attributes:
        pattern = r'"{}_dimensions":\s*\[([^\]]*)\]'
    else:
        return None
    shapes = [scope[operand].arrays[0].shape for operand in instruction.operands[:2]]

    def size(dimensions: str) -> int:
        """Product of the named dimensions of the first operand."""
        found = re.search(pattern.format(f"lhs_{dimensions}"), attributes)
        indices = re.findall(r"\d+", found[1]) if found else []
        return math.prod(shapes[0][int(index)] for index in indices)

    batch, contracted = size("batch"), size("contracting")
    rows, columns = (math.prod(shape) // (batch * contracted) for shape in shapes)
    return [batch, rows, columns, contracted]


def _attention_flops(scope: Computation, instruction: Instruction) -> float:
    """FLOPs of both products of attention, over the pairs that the mask allows."""
    text = instruction.attributes.partition(", backend_config=")[2]
    config = json.JSONDecoder().raw_decode(text)[0]["cudnn_fmha_backend_config"]
    scores = config["intermediate_tensor_shape"]["dimensions"]
    batch, heads, queries, keys = map(int, scores)
    pairs = float(queries * keys)
    if "CAUSAL" in config.get("mask_type", ""):
        window = int(config.get("sliding_window_length", 0)) or keys
        pairs = queries * window - window**2 / 2
    query = scope[instruction.operands[0]].arrays[0]
    width = math.prod(query.shape) // (batch * heads * queries)
    return 4.0 * batch * heads * width * pairs


def _moved(scope: Computation, instruction: Instruction) -> float:
    """Bytes read and written by a kernel that is not a fusion."""
    operands = [_bytes(scope[name].arrays) for name in instruction.operands]
    if instruction.opcode == "copy-start":
        return 2 * operands[0]
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    written = _written(scope, instruction)
    return 2 * written if instruction.opcode in _SLICES else sum(operands) + written


def _moved_by_fusion(body: Computation) -> float:
    """Bytes read and written by a fusion, each once; only the slices of stacked arrays."""
    parameters = [inner.name for inner in body.values() if inner.opcode == "parameter"]
    return sum(_read(body, name) for name in parameters) + _written(body, _root(body))


def _read(body: Computation, name: str) -> float:
    """Bytes that a fusion reads of the array `name` of its body."""
    whole, read = _bytes(body[name].arrays), 0.0
    for user in body.values():
        if name not in user.operands:
            continue
        is_sliced = user.operands[0] == name
        if user.opcode in ("bitcast", "reshape"):
            read += _read(body, user.name)
        elif is_sliced and user.opcode in _SLICES:
            read += _bytes(user.arrays)
        elif not (is_sliced and user.opcode == "dynamic-update-slice"):  # updated in place
            return whole
    return min(whole, read)


def _written(scope: Computation, instruction: Instruction) -> float:
    """Bytes written for the result of an instruction."""
    opcode, arrays = instruction.opcode, instruction.arrays
    if opcode == "tuple":
        return sum(_written(scope, scope[name]) for name in instruction.operands)
    if opcode == "bitcast":
        return _written(scope, scope[instruction.operands[0]])
    if opcode == "dynamic-update-slice":
        return _bytes(scope[instruction.operands[1]].arrays)
    if opcode == "get-tuple-element" and _is_workspace(scope, instruction):
        return 0.0
    if opcode == "custom-call" and len(arrays) > 1 and arrays[-1].dtype in _WORKSPACES:
        arrays = arrays[:-1]
    return _bytes(arrays)


def _is_workspace(scope: Computation, element: Instruction) -> bool:
    source = scope[element.operands[0]]
    is_last = f"index={len(source.arrays) - 1}" in element.attributes
    return source.opcode == "custom-call" and is_last and element.arrays[0].dtype in _WORKSPACES


def _bytes(arrays: list[Array]) -> float:
    return sum(array.bytes for array in arrays)
