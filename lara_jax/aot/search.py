"""`lara aot --search`: the largest batch that fits, and the layout that is fastest.

A layout is a mesh and a remat policy. Within one, memory grows nearly linearly with the rows, so a
few compiles find the most that fit:

    1  as many rows as the recipe has; what the state takes is known without compiling
    2  as many as the line through these two says
    3  as many as the line through the two compiles says, if that is more; and so on

Over layouts the search goes along one direction after the other: every remat policy on the first
mesh, then every other mesh with the policy that was fastest. Meshes on which the state alone does
not fit are never compiled.

Rows are tried in steps of an eighth or less of their number: 1, 2, ... 16, 18, ... 32, 36, ...
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Compiles of one layout, and the part of the memory that a guess aims at.
MOST = 6
AIM = 0.985
UNBOUNDED = 2**40
TENSOR = (1, 2, 4)

Mesh = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Devices along data, fsdp and tensor, and what is recomputed."""

    mesh: Mesh
    remat: str

    @property
    def pieces(self) -> int:
        """That a batch is split into."""
        return self.mesh[0] * self.mesh[1]

    def overrides(self, rows: int, accumulate_steps: int) -> tuple[str, ...]:
        """Of a recipe, so that it is laid out like this with so many rows a piece."""
        data, fsdp, tensor = self.mesh
        return (
            f"mesh.data={data}",
            f"mesh.fsdp={fsdp}",
            f"mesh.tensor={tensor}",
            f"model.remat={self.remat}",
            f"data.batch_size={rows * self.pieces * accumulate_steps}",
        )

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.mesh))} {self.remat}"


@dataclass(frozen=True, kw_only=True)
class Try:
    """A candidate and what was found.

    Attributes:
      layout: of the devices.
      rows: of each of its pieces, in one micro-batch.
      report: as `lara aot --json`, or with an "error".
    """

    layout: Layout
    rows: int
    report: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return bool(self.report["fits"])

    @property
    def speed(self) -> float:
        """Samples a second, as estimated; 0 where it does not fit."""
        return self.report.get("samples_per_second") or 0.0

    def json(self) -> dict[str, Any]:
        """The report, its layout first."""
        data, fsdp, tensor = self.layout.mesh
        return {
            "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor},
            "remat": self.layout.remat,
            "rows": self.rows,
        } | self.report


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched.

    Attributes:
      meshes: the first one is where remat policies are compared.
      remats: policies.
      state_bytes: what the state takes on one device of a mesh.
      granted_bytes: what a program may take on a device.
      first_rows: rows of a micro-batch to begin with, over all pieces.
      most_rows: rows of a micro-batch at most.
    """

    meshes: Sequence[Mesh]
    remats: Sequence[str]
    state_bytes: Callable[[Mesh], int]
    granted_bytes: float
    first_rows: int
    most_rows: int = UNBOUNDED

    @property
    def layouts(self) -> int:
        """How many are looked at."""
        return len(self.remats) + len(self.meshes) - 1


def search(space: Space, attempt: Callable[[Layout, int], dict[str, Any]]) -> Iterator[Try]:
    """Tries layouts and batches.

    Args:
      space: what to look at.
      attempt: compiles a layout with so many rows a piece, and reports.

    Yields:
      Each candidate when it is compiled.
    """
    tries: list[Try] = []
    rows = space.first_rows

    def look(layout: Layout) -> Iterator[Try]:
        nonlocal rows
        before = len(tries)
        for one in fill(space, layout, attempt, max(1, rows // layout.pieces)):
            tries.append(one)
            yield one
        fit = [one.rows for one in tries[before:] if one.fits]
        rows = layout.pieces * (max(fit) if fit else min(one.rows for one in tries[before:]))

    # A mesh that cannot hold the state says nothing about policies.
    holds = [mesh for mesh in space.meshes if space.state_bytes(mesh) <= space.granted_bytes]
    for mesh in space.meshes:
        if mesh not in holds:
            yield _too_small(space, Layout(mesh, space.remats[0]))
    for remat in space.remats if holds else ():
        yield from look(Layout(holds[0], remat))
    for mesh in holds[1:]:
        yield from look(Layout(mesh, best_first(tries)[0].layout.remat))


def best_first(tries: Sequence[Try]) -> list[Try]:
    """The fastest of those that fit, then those that do not, the smallest first."""
    return sorted(tries, key=lambda t: (-t.speed, t.report.get("peak_memory_bytes") or math.inf))


def fill(
    space: Space, layout: Layout, attempt: Callable[[Layout, int], dict[str, Any]], rows: int
) -> Iterator[Try]:
    """Tries more and fewer rows of a layout, until the most that fit are known."""
    tries: list[Try] = []
    most = space.most_rows // layout.pieces
    following: int | None = min(nice(rows), most) or None
    while following and len(tries) < MOST:
        tries.append(Try(layout=layout, rows=following, report=attempt(layout, following)))
        yield tries[-1]
        if "error" in tries[-1].report:
            return
        following = next_rows(tries, space.state_bytes(layout.mesh), space.granted_bytes, most)


def next_rows(tries: Sequence[Try], state: int, granted: float, most: int) -> int | None:
    """Which number of rows to try next.

    Args:
      tries: of one layout, at least one.
      state: bytes without any row, about.
      granted: bytes that a program may take.
      most: rows.

    Returns:
      None when enough is known.
    """
    fit = sorted((t.rows, t.report["peak_memory_bytes"]) for t in tries if t.fits)
    fail = sorted((t.rows, t.report["peak_memory_bytes"]) for t in tries if not t.fits)
    low, high = fit[-1][0] if fit else 0, fail[0][0] if fail else most + 1
    # The two compiles that are nearest to the limit, and the state if there is but one.
    near = [*(fit[-1:] if fail else fit[-2:]), *(fail[:1] if fit else fail[:2])]
    (rows, peak), (more_rows, more_peak) = near if len(near) == 2 else ((0, state), near[0])
    slope = (more_peak - peak) / (more_rows - rows)
    if slope > 0:
        guess = nice(max(0, int(rows + (AIM * granted - peak) / slope)))
    else:  # The compiler tells only a part of what does not fit.
        guess = nice((low + high) // 2 if fail else 2 * low)
    if guess <= low:
        if len(tries) > 1 and low and slope > 0:
            return None
        guess = low + _step(low)
    guess = min(guess, nice(high - 1))
    return guess if guess > low else None


def nice(rows: int) -> int:
    """The next number of rows, downwards, that is tried at all."""
    return rows - rows % _step(rows)


def _step(rows: int) -> int:
    return 2 ** max(0, rows.bit_length() - 4) if rows else 1


def likely_meshes(
    devices: int, slices: int, state_bytes: Callable[[Mesh], int], granted: float
) -> list[Mesh]:
    """Meshes worth a compile: `fsdp` over a whole slice, and over as few devices as leave half of
    the memory to the rest, each with `tensor` 1, 2 and 4."""
    found: list[Mesh] = []
    for tensor in TENSOR:
        most = devices // slices // tensor
        sizes = [size for size in range(1, most + 1) if devices % (slices * tensor * size) == 0]
        splits = [(devices // (size * tensor), size, tensor) for size in sizes]
        roomy = [mesh for mesh in splits if state_bytes(mesh) <= granted / 2]
        found += [*splits[-1:], *roomy[:1]]
    return list(dict.fromkeys(found))


def _too_small(space: Space, layout: Layout) -> Try:
    state = space.state_bytes(layout.mesh)
    error = f"the state alone takes {state} of {space.granted_bytes:.0f} bytes; not compiled"
    return Try(
        layout=layout,
        rows=0,
        report={"fits": False, "peak_memory_bytes": state, "error": error},
    )
