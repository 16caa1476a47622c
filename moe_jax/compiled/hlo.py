"""Parser for the HLO text of compiled programs. Pure Python, without jax."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64|c128)\[([\d,]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"\d+")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Array(NamedTuple):
    """An array type.

    Attributes:
      dtype: element type in HLO's spelling.
      shape: dimensions.
      space: memory space; 0 is the memory of the chip, and 1 the fast memory within a TPU.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> float:
        """Size in bytes."""
        bits = 8 if self.dtype == "pred" else int(_BITS.findall(self.dtype)[0])
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction of a computation.

    Attributes:
      name: name without the percent sign.
      type: type of the result with layouts; a tuple is in parentheses.
      opcode: operation code, such as `fusion`.
      operands: names of the operands.
      literal: text of a constant's value; empty for other instructions.
      attributes: text after the operands.
      is_root: True if its result is the result of the computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """Arrays of the result; several for a tuple."""
        return arrays_of(self.type)

    @property
    def origin(self) -> str:
        """JAX operation of the instruction, with the enclosing modules; may be empty."""
        match = _ORIGIN.search(self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> list[str]:
        """Names of the called computations, except for the condition of a loop."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [branch.strip().removeprefix("%") for branch in branches.split(",")]
        return names

    @property
    def condition(self) -> str | None:
        """Name of the condition's computation of a loop; None for other instructions."""
        match = _CONDITION.search(self.attributes)
        return match[1] if match else None


Computation = Mapping[str, Instruction]
"""Instructions by name, in the order of the text (the order of execution if scheduled)."""


class Module(NamedTuple):
    """A program.

    Attributes:
      computations: computations by name.
      entry: name of the entry computation.
    """

    computations: dict[str, Computation]
    entry: str


def root(computation: Computation) -> Instruction:
    """The instruction whose result is that of the computation."""
    return next(instruction for instruction in computation.values() if instruction.is_root)


def arrays_of(type_text: str) -> list[Array]:
    """Arrays of a type."""
    return [
        Array(dtype, tuple(int(size) for size in shape.split(",") if size), _space(layout))
        for dtype, shape, layout in _ARRAY.findall(type_text)
    ]


def _space(layout: str) -> int:
    found = _SPACE.search(layout)
    return int(found[1]) if found else 0


def parse_module(text: str) -> Module:
    """Parses the text of `Compiled.as_text`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    body: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if body is None:
            head = _HEAD.match(line)
            if head:
                body = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            body = None
        else:
            match = _INSTRUCTION.match(line)
            if match:
                body[match[2]] = _instruction(match[2], match[3], bool(match[1]))
    if not entry:
        raise ValueError("the text of the program has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    """Parses `TYPE opcode(operands), attributes`."""
    # Only the type of a tuple has spaces, all within its parentheses.
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"the instruction {name} of the program has no opcode")
    start = opcode.end() - 1
    operands_end = _closing(text, start)
    arguments, attributes = text[start + 1 : operands_end - 1], text[operands_end:]
    literal = arguments if opcode[1] == "constant" else ""
    operands = tuple(_OPERAND.findall(arguments))
    return Instruction(name, text[:end], opcode[1], operands, literal, attributes, is_root)


def _closing(text: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if not depth:
            return position + 1
    raise ValueError("the text of the program ends within parentheses")
