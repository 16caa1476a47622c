"""Bytes that the kernels of a compiled program read, write and send."""

import re

from moe_jax.compiled.hlo import Array, Computation, Instruction, root

# These opcodes read only a part of their operand.
_SLICES = ("slice", "dynamic-slice", "gather")
# The last array of a library call's result, if of bytes, is its workspace.
_WORKSPACES = ("s8", "u8")
# Opcodes of collective operations, with the bytes that each of n chips sends around a ring, as a
# multiple of (n - 1) / n of the larger of its operand and its result.
COLLECTIVES = {
    "all-gather": 1,
    "all-reduce": 2,
    "all-to-all": 1,
    "collective-permute": 1,
    "ragged-all-to-all": 1,
    "reduce-scatter": 1,
}
_GROUP = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


def bytes_sent(scope: Computation, instruction: Instruction) -> float:
    """Bytes that each chip sends in a collective operation."""
    opcode = instruction.opcode.removesuffix("-start")
    operands = sum(array.bytes for name in instruction.operands for array in scope[name].arrays)
    # The type of what is begun holds the operands too.
    begun = operands if instruction.opcode.endswith("-start") and opcode != "all-reduce" else 0.0
    results = sum(array.bytes for array in instruction.arrays) - begun
    group = _GROUP.search(instruction.attributes)
    chips = 2
    if group:
        chips = int(group[2]) if group[2] else len(group[1].split(","))
    return COLLECTIVES[opcode] * max(operands, results) * (chips - 1) / chips


def bytes_moved(scope: Computation, instruction: Instruction) -> float:
    """Bytes read and written by a kernel that is not a fusion."""
    operands = [_bytes(scope[name].arrays) for name in instruction.operands]
    if instruction.opcode == "copy-start":  # its type is that of the copy, the source and a counter
        return operands[0] + _bytes(instruction.arrays[:1])
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    written = _written(scope, instruction)
    return 2 * written if instruction.opcode in _SLICES else sum(operands) + written


def bytes_moved_by_fusion(body: Computation) -> float:
    """Bytes read and written by a fusion, each once; only the slices of stacked arrays."""
    parameters = [inner.name for inner in body.values() if inner.opcode == "parameter"]
    return sum(_read(body, name) for name in parameters) + _written(body, root(body))


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
    return _bytes(without_workspace(arrays) if opcode == "custom-call" else arrays)


def without_workspace(arrays: list[Array]) -> list[Array]:
    """The arrays of a result, without the workspace of a library call."""
    has_workspace = len(arrays) > 1 and arrays[-1].dtype in _WORKSPACES
    return arrays[:-1] if has_workspace else arrays


def _is_workspace(scope: Computation, element: Instruction) -> bool:
    source = scope[element.operands[0]]
    is_last = f"index={len(source.arrays) - 1}" in element.attributes
    return source.opcode == "custom-call" and is_last and element.arrays[0].dtype in _WORKSPACES


def _bytes(arrays: list[Array]) -> float:
    """Bytes of arrays in the chip's memory; those in the fast memory of a TPU are not moved."""
    return sum(array.bytes for array in arrays if array.space != 1)
