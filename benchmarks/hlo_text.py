"""The text of a compiled program (HLO), read into instructions; pure Python, without jax."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64|c128)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Array(NamedTuple):
    """An array type: its element type, as HLO spells it, and its dimensions."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> float:
        bits = 8 if self.dtype == "pred" else int(_BITS.findall(self.dtype)[0])
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without the percent sign.
      type: of the result, with layouts; in parentheses where it is a tuple.
      opcode: such as `fusion`.
      operands: names of the instructions whose results it takes.
      attributes: the text behind the operands.
      is_root: whether its result is that of its computation.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result, one unless it is a tuple."""
        return arrays_of(self.type)

    @property
    def origin(self) -> str:
        """The JAX operation that it came from, with the modules around it; may be empty."""
        found = _ORIGIN.search(self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls, but for the condition of a loop."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [branch.strip().removeprefix("%") for branch in branches.split(",")]
        return names


Computation = Mapping[str, Instruction]
"""Instructions by name, in the order of the text: in a scheduled program that of execution."""


class Module(NamedTuple):
    """A program: its computations by name, and the name of the one that runs first."""

    computations: dict[str, Computation]
    entry: str


def arrays_of(type_text: str) -> list[Array]:
    """The arrays that a type is made of."""
    return [
        Array(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(type_text)
    ]


def parse_module(text: str) -> Module:
    """Reads what `Compiled.as_text` gives.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    inside: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if inside is None:
            head = _HEAD.match(line)
            if head:
                inside = computations[head[2]] = {}
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            inside = None
        else:
            found = _INSTRUCTION.match(line)
            if found:
                inside[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("the text of the program has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, text: str, is_root: bool) -> Instruction:
    """Reads `TYPE opcode(operands), attributes`."""
    # Only the type of a tuple has spaces, and those inside its parentheses.
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"the instruction {name} of the program has no opcode")
    start = opcode.end() - 1
    behind = _closing(text, start)
    operands = tuple(_OPERAND.findall(text[start:behind]))
    return Instruction(name, text[:end], opcode[1], operands, text[behind:], is_root)


def _closing(text: str, start: int) -> int:
    """The position behind the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if not depth:
            return position + 1
    raise ValueError("the text of the program ends within parentheses")
