"""The optimised HLO text of a compiled program, parsed.

    %name = TYPE opcode(%operand, ...), attribute=value, ...

Sources: the grammar is that of xla/hlo/parser; notations of replica groups are those of
xla/hlo/ir/replica_group.h.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}

_LEAF = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
NAME = re.compile(r"%([\w.\-]+)")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclass(frozen=True)
class Array:
    """One array of an instruction's value: its dtype, sizes, and memory space (0: main memory)."""

    dtype: str
    sizes: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = BITS[self.dtype] if self.dtype in BITS else int(digits[0]) if digits else 0
        return math.prod(self.sizes) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      arrays: its value, tuples flattened.
      operands: names of other lines of the computation.
      inside: text between the opcode's parentheses.
      rest: text after them: attributes.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    rest: str

    def attribute(self, name: str) -> str | None:
        """The text of an attribute up to a comma or space, without a leading %."""
        found = re.search(rf"(?:^|[ ,]){name}=%?([^\s,]+)", self.rest)
        return found[1] if found else None


@dataclass(frozen=True)
class Computation:
    """Lines in the order in which they run, the root's name."""

    lines: Mapping[str, Instruction]
    root: str

    @cached_property
    def parameters(self) -> dict[int, str]:
        """Names by number."""
        found = (line for line in self.lines.values() if line.opcode == "parameter")
        return {int(line.inside): line.name for line in found}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The lines that take a line's value."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.lines}
        for line in self.lines.values():
            for name in dict.fromkeys(line.operands):
                users[name].append(line)
        return users

    def read(self, line: Instruction) -> list[tuple[Array, ...]]:
        """The values of a line's operands."""
        return [self.lines[name].arrays for name in line.operands]


@dataclass(frozen=True)
class Program:
    """The computations of a module by name, and which of them is run."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Program:
    """Reads `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: no computation is marked as the entry.
    """
    computations: dict[str, Computation] = {}
    lines: dict[str, Instruction] | None = None
    entry, name, root = "", "", ""
    for row in text.splitlines():
        if lines is None:
            header = _HEADER.match(row)
            if header:
                lines, root, name = {}, "", header[2]
                entry = name if header[1] else entry
        elif row.startswith("}"):
            computations[name] = Computation(lines, root)
            lines = None
        elif start := _START.match(row):
            line = _instruction(start[2], row[start.end() :])
            lines[line.name] = line
            root = line.name if start[1] else root
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is no optimised HLO module")
    return Program(computations, entry)


def _instruction(name: str, text: str) -> Instruction:
    """Of "TYPE opcode(operands), attributes"."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing - 1]
    opcode = text[end:opening].strip()
    operands = () if opcode == "constant" else tuple(NAME.findall(inside))
    return Instruction(name, opcode, _arrays(text[:end]), operands, inside, text[closing:])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` has closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"parentheses do not match in {text[:80]!r}")


def _arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type."""
    found = []
    for dtype, sizes, layout in _LEAF.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        numbers = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
        found.append(Array(dtype, numbers, int(space[1]) if space else 0))
    return tuple(found)


def groups(text: str) -> tuple[tuple[int, ...], ...]:
    """The groups of partitions in a collective's attributes; () where all are one group.

    Four notations: "{{0,1},{2,3}}", "[2,2]<=[2,2]T(1,0)" (rows of an array), and "mesh['a'=2,
    'b'=2] {'a'}" (partitions laid out as a mesh exchange along the named axes); also
    "source_target_pairs={{0,1}}".

    Raises:
      ValueError: another notation.
    """
    found = re.search(r"(?:replica_groups|source_target_pairs)=(.*)", text)
    if not found or found[1].startswith("{}"):
        return ()
    value = found[1]
    if value.startswith("{{"):
        rows = re.findall(r"\{([\d,]+)\}", value[: value.index("}}") + 2])
        return tuple(tuple(map(int, row.split(","))) for row in rows)
    order = r"(?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)"
    if iota := re.match(rf"\[([\d,]+)\]{order}", value):
        sizes = [int(size) for size in iota[1].split(",")]
        return _rows(_iota(sizes, iota[2], iota[3]).reshape(-1, sizes[-1]))
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? ?\{([^}]*)\}", value):
        axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        along = re.findall(r"'([^']+)'", mesh[2])
        if "device_ids" not in mesh[0] and ":(" not in mesh[0]:
            layout = np.arange(math.prod(int(n) for _, n in axes)).reshape(
                [int(n) for _, n in axes]
            )
            numbers = [[name for name, _ in axes].index(name) for name in along]
            last = list(range(-len(numbers), 0))
            size = math.prod(layout.shape[number] for number in numbers)
            return _rows(np.moveaxis(layout, numbers, last).reshape(-1, size))
    raise ValueError(f"groups of partitions in an unknown notation: {value[:120]}")


def _iota(sizes: Sequence[int], shape: str, order: str | None) -> np.ndarray:
    array = np.arange(math.prod(sizes)).reshape([int(size) for size in shape.split(",")])
    return array.transpose([int(axis) for axis in order.split(",")]) if order else array


def _rows(array: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(number) for number in row) for row in array)
