"""What a compiled program does, read from its optimised HLO text.

XLA's own count (`cost_analysis`) takes a loop's body once, however often it runs. Here every loop's
trips are read from its condition, and what the body does is multiplied by them:

    entry ── fusion            x 1
          ── while, 36 trips
               ── fusion       x 36
               ── all-gather   x 36
               ── while, 3 trips
                    ── fusion  x 108

FLOPs are those of matrix products (`dot`, `convolution`), as in `lara_jax.flops`; a small product
that the compiler turns into multiply and reduce is not among them. Bytes are what instructions read
from and write to the device's main memory: values in faster memories (`S(1)` in a layout is a TPU's
VMEM) cost nothing, and a fusion that takes a slice of an array reads the slice. Tiles' padding is
not counted.

A TPU starts a collective, goes on with it beside a computation and ends it in fusions of one
channel: that is one exchange. `async_collective_name` marks one that the scheduler made synchronous
again. Between slices data go through the hosts: `send` and `recv` of the Megascale runtime.

Sources: xla/service/hlo_cost_analysis.cc, "HandleConvolution", for convolutions;
xla/service/convert_async_collectives_to_sync.cc.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lara_jax.aot.hlo import NAME, Array, Computation, Instruction, Program, groups

# They name, pass on or wait for values that something else has moved.
# fmt: off
FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "slice-done",
    "domain", "send", "recv", "async-update",
})
COLLECTIVES = frozenset({
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
})
# fmt: on
# Names that the Megascale runtime gives what slices do together.
BETWEEN_SLICES = {"ONE_TO_ONE": "collective-permute"} | {
    kind.upper().replace("-", "_"): kind for kind in COLLECTIVES
}
COPIES = frozenset({"copy-start", "slice-start"})
WORK = frozenset({"fusion", "while", "convolution", "dot", "custom-call"})
ALIASES = frozenset({"bitcast", "copy", "convert", "reshape", "opt-barrier"})

TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="[^"]*"')


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An instruction that does something.

    Attributes:
      times: how often it runs.
      flops: of matrix products, once.
      bytes: from and to main memory, once.
      copies: whether it only moves data, beside the computation.
    """

    name: str
    times: int
    flops: int
    bytes: int
    copies: bool = False


@dataclass(frozen=True, kw_only=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: "all-gather", "all-reduce", ...
      times: how often it runs.
      bytes: of a device's operands, once.
      groups: which partitions of a slice exchange; () for all.
      between_slices: whether all slices exchange instead, each device with its likes.
      overlapped: whether something is computed between its start and its end.
    """

    name: str
    kind: str
    times: int
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    overlapped: bool
    between_slices: bool = False


@dataclass(kw_only=True)
class Census:
    """All that a program does.

    Attributes:
      operations: instructions with FLOPs or bytes.
      collectives: exchanges.
      unknown_loops: loops whose trips the text does not tell; they are counted once.
    """

    operations: list[Operation] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    unknown_loops: list[str] = field(default_factory=list)

    @property
    def flops(self) -> int:
        """Of matrix products, on one device."""
        return sum(op.times * op.flops for op in self.operations)

    @property
    def bytes(self) -> int:
        """From and to one device's main memory."""
        return sum(op.times * op.bytes for op in self.operations)


def census(program: Program) -> Census:
    """Counts everything, each loop's body as often as it runs; of a conditional all branches.

    Raises:
      ValueError: groups of devices in an unknown notation, or an unknown exchange between slices.
    """
    counted = Census()
    _Counter(program, counted).visit(program.entry, 1, None)
    return counted


class _Counter:
    """Walks from the entry through loops and calls."""

    def __init__(self, program: Program, counted: Census) -> None:
        self._program, self._counted = program, counted
        self._started = {
            channel
            for body in program.computations.values()
            if _starts(body)
            for line in body.lines.values()
            if line.opcode in COLLECTIVES and (channel := line.attribute("channel_id"))
        }

    def visit(self, name: str, times: int, loop: "_Loop | None") -> None:
        body = self._program.computations[name]
        for line in body.lines.values():
            if line.opcode == "while":
                inner = _Loop(self._program, body, line, loop)
                trips = inner.trips()
                if trips is None:
                    self._counted.unknown_loops.append(line.name)
                self.visit(inner.body_name, times * (1 if trips is None else trips), inner)
            elif line.opcode in ("call", "conditional"):
                for callee in _called(line):
                    self.visit(callee, times, None)
            elif line.opcode == "async-start":
                for callee in _called(line):
                    self._asynchronous(callee, times, overlapped=_overlaps(body, line))
            else:
                self._operation(body, line, times)
                self._collective(body, line, times)

    def _asynchronous(self, name: str, times: int, *, overlapped: bool) -> None:
        """What is wrapped between an "async-start" and an "async-done"."""
        body = self._program.computations[name]
        for line in body.lines.values():
            self._operation(body, line, times, copies=True)
            if line.opcode in COLLECTIVES:
                self._add(body, line, line.opcode, times, overlapped=overlapped)

    def _operation(
        self, body: Computation, line: Instruction, times: int, *, copies: bool = False
    ) -> None:
        flops, moved = _flops(self._program, body, line), _bytes(self._program, body, line)
        if flops or moved:
            self._counted.operations.append(
                Operation(
                    name=line.name,
                    times=times,
                    flops=flops,
                    bytes=moved,
                    copies=copies or line.opcode in COPIES,
                )
            )

    def _collective(self, body: Computation, line: Instruction, times: int) -> None:
        """A line that is a collective, or a fusion around some (a TPU starts and ends them so)."""
        if line.opcode == "send" and (found := TRANSFER.search(line.rest)):
            if found[1] not in BETWEEN_SLICES:
                raise ValueError(
                    f"{line.name} does {found[1]} between slices; known: "
                    f"{', '.join(sorted(BETWEEN_SLICES))}"
                )
            kind, between = BETWEEN_SLICES[found[1]], True
        else:
            kind, between = line.opcode.removesuffix("-start"), False
        if kind in COLLECTIVES:
            overlapped = _overlaps(body, line)
            self._add(body, line, kind, times, overlapped=overlapped, between_slices=between)
        elif line.opcode == "fusion":
            self._fused_collectives(body, line, times)

    def _fused_collectives(self, body: Computation, line: Instruction, times: int) -> None:
        name = line.attribute("calls") or ""
        fused = self._program.computations[name]
        starts = _starts(fused)
        for inner in fused.lines.values():
            if inner.opcode not in COLLECTIVES:
                continue
            channel = inner.attribute("channel_id")
            if not starts and channel in self._started:
                continue
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else inner.opcode
            overlapped = starts and self._fused_overlap(body, line, channel)
            self._add(fused, inner, kind, times, overlapped=overlapped)

    def _fused_overlap(self, body: Computation, start: Instruction, channel: str | None) -> bool:
        """Whether another fusion runs before the one that ends the collective of `channel`."""
        after = list(body.lines.values())
        after = after[after.index(start) + 1 :]
        for line in after:
            fused = self._program.computations.get(line.attribute("calls") or "")
            if fused is None and line.opcode in WORK:
                return True
            if line.opcode != "fusion" or fused is None:
                continue
            channels = {inner.attribute("channel_id") for inner in fused.lines.values()}
            targets = " ".join(inner.rest for inner in fused.lines.values())
            return channel not in channels or "AsyncCollectiveDone" not in targets
        return True  # It ends in the loop's next iteration.

    def _add(
        self,
        body: Computation,
        line: Instruction,
        kind: str,
        times: int,
        *,
        overlapped: bool,
        between_slices: bool = False,
    ) -> None:
        moved = sum(array.bytes for arrays in body.read(line) for array in arrays)
        self._counted.collectives.append(
            Collective(
                name=line.name,
                kind=kind,
                times=times,
                bytes=moved,
                groups=groups(line.rest),
                overlapped=overlapped,
                between_slices=between_slices,
            )
        )


def _starts(body: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in line.rest for line in body.lines.values())


def _called(line: Instruction) -> Iterator[str]:
    """Computations that a call or conditional runs."""
    for name in ("to_apply", "calls", "true_computation", "false_computation"):
        if found := line.attribute(name):
            yield found
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line.rest):
        yield from NAME.findall(branches[1])


def _overlaps(body: Computation, start: Instruction) -> bool:
    """Whether work lies between a line that starts an exchange and the one that waits for it."""
    if start.opcode == "send":
        meeting = RENDEZVOUS.search(start.rest)
        names = {
            line.name
            for line in body.lines.values()
            if line.opcode == "recv" and meeting and meeting[0] in line.rest
        }
    elif start.opcode.endswith("-start"):
        names = {start.name}
    else:
        return False
    lines = list(body.lines.values())
    for line in lines[lines.index(start) + 1 :]:
        if line.opcode.endswith("-done") and names.intersection(line.operands):
            return False
        if line.opcode in WORK:
            return True
    return True


class _Loop:
    """A while loop in a computation, and what its state begins with."""

    def __init__(
        self, program: Program, outside: Computation, line: Instruction, around: "_Loop | None"
    ) -> None:
        self._program, self._outside, self._around = program, outside, around
        self._line = line
        self.body_name = line.attribute("body") or ""

    def trips(self) -> int | None:
        """How often it runs; None where the text does not tell."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', self._line.rest)
        if known:
            return int(known[1])
        test = self._root("condition")
        if not (isinstance(test, tuple) and test[0] == "compare" and test[1] in ("LT", "LE")):
            return None
        _, direction, counter, limit = test
        if not (isinstance(counter, tuple) and counter[0] == "element"):
            return None
        first, last = self.begins(counter[1]), self._value(limit)
        step = self._step(counter[1])
        if first is None or last is None or not step:
            return None
        return max(0, -((first - last - (direction == "LE")) // step))

    def begins(self, index: int) -> int | None:
        """The constant that an element of the state has at first."""
        state = self._outside.lines[self._line.operands[0]]
        if state.opcode != "tuple":
            return None
        value = _expression(self._program, self._outside, state.operands[index])
        if isinstance(value, tuple) and value[0] == "element" and self._around:
            return self._around.constant(value[1])
        return value if isinstance(value, int) else None

    def constant(self, index: int) -> int | None:
        """The value of an element that no iteration changes."""
        return self.begins(index) if self._next(index) == ("element", index) else None

    def _value(self, expression: object) -> int | None:
        if isinstance(expression, tuple) and expression[0] == "element":
            return self.constant(expression[1])
        return expression if isinstance(expression, int) else None

    def _step(self, index: int) -> int | None:
        after = self._next(index)
        if not (isinstance(after, tuple) and after[0] == "add"):
            return None
        by = [part for part in after[1:] if part != ("element", index)]
        return self._value(by[0]) if len(by) == 1 else None

    def _next(self, index: int) -> object:
        """What an element of the state becomes, as an expression."""
        body = self._program.computations[self.body_name]
        root = body.lines[body.root]
        if root.opcode != "tuple":
            return None
        return _expression(self._program, body, root.operands[index])

    def _root(self, attribute: str) -> object:
        body = self._program.computations[self._line.attribute(attribute) or ""]
        return _expression(self._program, body, body.root)


def _expression(
    program: Program, body: Computation, name: str, given: Sequence[object] | None = None
) -> object:
    """A scalar as an int, ("element", i) of the computation's state, ("add", a, b) or
    ("compare", direction, a, b); None for anything else. `given`: a fusion's operands."""
    line = body.lines[name]

    def operand(i: int) -> object:
        return _expression(program, body, line.operands[i], given)

    if line.opcode == "constant":
        return int(line.inside) if re.fullmatch(r"-?\d+", line.inside) else None
    if line.opcode in ALIASES:
        return operand(0)
    if line.opcode == "parameter":
        return given[int(line.inside)] if given is not None else ("state",)
    if line.opcode == "get-tuple-element":
        index, source = int(line.attribute("index") or 0), body.lines[line.operands[0]]
        if source.opcode == "tuple":
            return _expression(program, body, source.operands[index], given)
        return ("element", index) if operand(0) == ("state",) else None
    if line.opcode == "add":
        return ("add", operand(0), operand(1))
    if line.opcode == "compare":
        return ("compare", line.attribute("direction"), operand(0), operand(1))
    if line.opcode == "fusion":
        fused = program.computations[line.attribute("calls") or ""]
        inputs = [operand(i) for i in range(len(line.operands))]
        return _expression(program, fused, fused.root, inputs)
    return None


def _flops(program: Program, body: Computation, line: Instruction) -> int:
    """Of a product, or of those in a fusion."""
    if line.opcode == "fusion":
        fused = program.computations[line.attribute("calls") or ""]
        return sum(_flops(program, fused, inner) for inner in fused.lines.values())
    if line.opcode == "dot":
        left = body.read(line)[0][0].sizes
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2 * math.prod(line.arrays[0].sizes) * math.prod(left[axis] for axis in axes)
    return _convolution(body, line) if line.opcode == "convolution" else 0


def _convolution(body: Computation, line: Instruction) -> int:
    """Products and sums of a convolution, where the window is on data (no padding, no holes)."""
    labels = re.split(r"_|->", line.attribute("dim_labels") or "")
    left, right = (arrays[0].sizes for arrays in body.read(line))
    sizes = [dict(zip(*pair, strict=True)) for pair in zip(labels, (left, right), strict=False)]
    out = dict(zip(labels[2], line.arrays[0].sizes, strict=True))
    window = re.search(r"window=\{([^}]*)\}", line.rest)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    products = 2 * sizes[1]["i"] * out["f"] * sizes[0]["b"]
    products //= int(line.attribute("batch_group_count") or 1)
    for number, axis in enumerate(sorted(set(labels[2]) - {"b", "f"})):

        def of(name: str, default: str, number: int = number) -> str:
            return given[name].split("x")[number] if name in given else default

        stride, holes, spread = (int(of(f, "1")) for f in ("stride", "lhs_dilate", "rhs_dilate"))
        before = int(of("pad", "0_0").split("_")[0])
        places = np.arange(out[axis])[:, None] * stride + np.arange(sizes[1][axis]) * spread
        places = places - before
        inside = (places >= 0) & (places <= (sizes[0][axis] - 1) * holes) & (places % holes == 0)
        products *= int(inside.sum())
    return products


def _bytes(program: Program, body: Computation, line: Instruction) -> int:
    """That a line reads from and writes to main memory."""
    if line.opcode in FREE or line.opcode.endswith("-done"):
        return 0
    if line.opcode in COPIES:
        ends = line.arrays[:2]
        return min(a.bytes for a in ends) * sum(a.space == 0 for a in ends)
    if line.opcode == "fusion":
        fused = program.computations[line.attribute("calls") or ""]
        read = 0
        for number, name in enumerate(line.operands):
            arrays = body.lines[name].arrays
            if len(arrays) == 1 and arrays[0].space == 0:
                read += min(arrays[0].bytes, _taken(program, fused, fused.parameters[number]))
        return read + _written(fused, line.arrays)
    if '"AllocateBuffer"' in line.rest:
        return 0
    operands = [sum(a.bytes for a in arrays if a.space == 0) for arrays in body.read(line)]
    result = sum(array.bytes for array in line.arrays if array.space == 0)
    if line.opcode == "dynamic-update-slice":
        return operands[1] + (operands[1] if result else 0)
    if line.opcode in ("dynamic-slice", "slice", "gather"):
        whole = sum(array.bytes for array in line.arrays)
        return result + (whole if operands[0] else 0)
    return sum(operands) + result


def _taken(program: Program, fused: Computation, name: str) -> int:
    """Bytes that a fusion takes of an operand: of an array that is only sliced, the slices."""
    total = 0
    for line in fused.users[name]:
        whole = sum(array.bytes for array in line.arrays)
        if line.opcode in ("dynamic-slice", "slice", "gather") and line.operands[0] == name:
            total += whole
        elif line.opcode == "bitcast":
            total += _taken(program, fused, line.name)
        elif line.opcode == "fusion":
            inner = program.computations[line.attribute("calls") or ""]
            for number, operand in enumerate(line.operands):
                if operand == name:
                    total += _taken(program, inner, inner.parameters[number])
        elif line.opcode in COLLECTIVES or line.opcode in ("tuple", "custom-call"):
            continue
        elif not (line.opcode == "dynamic-update-slice" and line.operands[0] == name):
            total += sum(array.bytes for array in fused.lines[name].arrays)
    return total


def _written(fused: Computation, results: Sequence[Array]) -> int:
    """Bytes that a fusion writes: of an array that it changes in place, the new piece."""
    root = fused.lines[fused.root]
    names = root.operands if root.opcode == "tuple" else [root.name]
    if len(names) != len(results):
        return 0  # The state of a collective that starts or goes on.
    total = 0
    for name, array in zip(names, results, strict=True):
        line = fused.lines[name]
        while line.opcode == "bitcast":
            line = fused.lines[line.operands[0]]
        if array.space or line.opcode == "parameter" or line.opcode in COLLECTIVES:
            continue
        if line.opcode == "dynamic-update-slice":
            total += fused.lines[line.operands[1]].arrays[0].bytes
        else:
            total += array.bytes
    return total
