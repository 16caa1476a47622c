"""A model of the time that a compiled GPU program takes, read from its optimised HLO text.

Each kernel takes the longer of two times, that of its operations and that of the bytes which it
reads and writes, and a constant for its launch. Kernels run one after another, and what a loop
holds runs as often as the loop does. The figures rank programs for the same chip; they are an
estimate, not a measurement. The model knows no L2 cache, no overlap of copies with computation, no
CUDA graphs, and no kernel that falls short of the rates. Operations are those of matrix products
and of cuDNN's attention. Pure Python on text, without jax.
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
"""A product is thin where one of its three sizes is at most this: the ranks of adapters."""


class Rates(NamedTuple):
    """Rates that a GPU reaches.

    Attributes:
      product: FLOP/s of a large matrix product in bfloat16.
      attention, attention_backward: FLOP/s of cuDNN's attention.
      memory: bytes/s to and from memory.
      launch: seconds a kernel takes besides.
    """

    product: float
    attention: float
    attention_backward: float
    memory: float
    launch: float


# Some four fifths of the peak of dense products and nine tenths of the memory's, as is usual for
# large ones. The rates of attention are assumed.
H200 = Rates(
    product=790e12, attention=500e12, attention_backward=400e12, memory=4.3e12, launch=2e-6
)


class Kernel(NamedTuple):
    """A kernel of the program, or a library's call that launches one.

    Attributes:
      kind: a product, attention, or how XLA generates it.
      launches: how often a run of the program launches it.
      flops: operations of one launch.
      moved: bytes that one launch reads and writes.
      seconds: of one launch, by the model.
      result: the type of what it writes.
      origin: the JAX operation that it came from, with the modules around it.
    """

    kind: str
    launches: int
    flops: float
    moved: float
    seconds: float
    result: str
    origin: str


class Totals(NamedTuple):
    """Sums over kernels, each as often as it is launched."""

    kernels: int
    flops: float
    moved: float
    seconds: float


class Roofline(NamedTuple):
    """The model of one run of a program.

    Attributes:
      kernels: in the order of the program.
      unknown_loops: how many loops were counted as one round, as their length is not known.
    """

    kernels: list[Kernel]
    unknown_loops: int

    @property
    def total(self) -> Totals:
        return totals(self.kernels)

    @property
    def kinds(self) -> dict[str, Totals]:
        """Totals by the kind of kernel, the longest first."""
        return grouped(self.kernels, lambda kernel: kernel.kind)


def totals(kernels: Iterable[Kernel]) -> Totals:
    """The sums over some kernels."""
    kernels = list(kernels)
    return Totals(
        kernels=sum(kernel.launches for kernel in kernels),
        flops=sum(kernel.launches * kernel.flops for kernel in kernels),
        moved=sum(kernel.launches * kernel.moved for kernel in kernels),
        seconds=sum(kernel.launches * kernel.seconds for kernel in kernels),
    )


def grouped(kernels: Iterable[Kernel], key: Callable[[Kernel], Key]) -> dict[Key, Totals]:
    """Totals of the kernels of equal `key`, the longest first."""
    groups: dict[Key, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(key(kernel), []).append(kernel)
    sums = {name: totals(group) for name, group in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1].seconds))


def roofline(text: str, rates: Rates = H200) -> Roofline:
    """Models a program for one GPU.

    Args:
      text: the optimised program, of `Compiled.as_text`.
      rates: of the GPU.
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


# These take no time on the GPU: they name buffers or parts of them, or wait for what was begun.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all optimization-barrier "
    "partition-id replica-id".split()
)
# Of their operand they read only what they take.
_SLICES = ("slice", "dynamic-slice", "gather")
# A library's call works in the last array of its result, a buffer of bytes.
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
    """The kernels of a computation that itself runs `launches` times, with where they stand."""
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
            # One branch runs, and the text does not say which: the one of most launches is taken.
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
    """The computation of a fusion; None for any other instruction."""
    is_fusion = instruction.opcode in ("fusion", "fusion-start")
    return module.computations[instruction.called[0]] if is_fusion else None


def _root(body: Computation) -> Instruction:
    return next(instruction for instruction in body.values() if instruction.is_root)


def _result(instruction: Instruction) -> str:
    """The type of a result for people, without layouts and workspaces."""
    arrays = instruction.arrays
    if len(arrays) > 1 and arrays[-1].dtype in _WORKSPACES:
        arrays = arrays[:-1]
    return " ".join(f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in arrays)


def _work(
    scope: Computation, instruction: Instruction, *, is_fusion: bool
) -> tuple[str, float, Instruction]:
    """The kind of a kernel, its operations, and the instruction that says where it is from.

    Args:
      scope: the body of a fusion, or the computation that the instruction stands in.
      instruction: the kernel.
      is_fusion: which of the two.
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
            # Five products where forward has two: the scores again, and four gradients.
            return ATTENTION_BACKWARD, 2.5 * flops, instruction
        return ATTENTION, flops, instruction
    return _plain_kind(instruction), 0.0, instruction


def _plain_kind(instruction: Instruction) -> str:
    """The kind of a kernel that multiplies no matrices."""
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
    """Batch, rows, columns and contracted size of a matrix product; None for what is none."""
    attributes = instruction.attributes
    if instruction.opcode == "dot":
        pattern = r"\b{}_dims=\{{([^}}]*)\}}"
    elif instruction.opcode == "custom-call" and "gemm_backend_config" in attributes:
        pattern = r'"{}_dimensions":\s*\[([^\]]*)\]'
    else:
        return None
    shapes = [scope[operand].arrays[0].shape for operand in instruction.operands[:2]]

    def size(dimensions: str) -> int:
        """The number of elements that the named dimensions of the first operand span."""
        found = re.search(pattern.format(f"lhs_{dimensions}"), attributes)
        indices = re.findall(r"\d+", found[1]) if found else []
        return math.prod(shapes[0][int(index)] for index in indices)

    batch, contracted = size("batch"), size("contracting")
    rows, columns = (math.prod(shape) // (batch * contracted) for shape in shapes)
    return [batch, rows, columns, contracted]


def _attention_flops(scope: Computation, instruction: Instruction) -> float:
    """Operations of both products of attention over the pairs that its mask leaves."""
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
    """Bytes that a kernel other than a fusion reads and writes."""
    operands = [_bytes(scope[name].arrays) for name in instruction.operands]
    if instruction.opcode == "copy-start":
        return 2 * operands[0]
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    written = _written(scope, instruction)
    return 2 * written if instruction.opcode in _SLICES else sum(operands) + written


def _moved_by_fusion(body: Computation) -> float:
    """Bytes that a fusion reads and writes: each once, and of stacks only the slices."""
    parameters = [inner.name for inner in body.values() if inner.opcode == "parameter"]
    return sum(_read(body, name) for name in parameters) + _written(body, _root(body))


def _read(body: Computation, name: str) -> float:
    """Bytes that a fusion reads of what is called `name` in its body."""
    whole, read = _bytes(body[name].arrays), 0.0
    for user in body.values():
        if name not in user.operands:
            continue
        is_sliced = user.operands[0] == name
        if user.opcode in ("bitcast", "reshape"):
            read += _read(body, user.name)
        elif is_sliced and user.opcode in _SLICES:
            read += _bytes(user.arrays)
        elif not (is_sliced and user.opcode == "dynamic-update-slice"):  # it is updated in place
            return whole
    return min(whole, read)


def _written(scope: Computation, instruction: Instruction) -> float:
    """Bytes that are written for the result of an instruction."""
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
