"""The search over layouts and batches, against compilers whose memory is a formula."""

from collections.abc import Callable
from typing import Any

import pytest

from lara_jax.aot.search import (
    MOST,
    Layout,
    Mesh,
    Space,
    best_first,
    fill,
    likely_meshes,
    nice,
    search,
)

GIB = 2**30
GRANTED = 16 * GIB
# Of a row, and the seconds it takes: what is kept is not computed again.
ROW_BYTES = {"none": 0.8 * GIB, "dots": 0.4 * GIB, "full": 0.1 * GIB}
ROW_SECONDS = {"none": 1.0, "dots": 1.1, "full": 1.35}


class Compiler:
    """Memory: state, half of it again for gradients, and so much a row."""

    def __init__(self, *, state: float = 4 * GIB, bend: float = 0.0, partly: bool = False) -> None:
        self.state, self.bend, self.partly = state, bend, partly
        self.calls: list[tuple[Layout, int]] = []

    def state_bytes(self, mesh: Mesh) -> int:
        return int(self.state * 4 / (mesh[1] * mesh[2]))

    def peak(self, layout: Layout, rows: int) -> float:
        """In bytes; with a bend, more than a line for many rows."""
        part = rows * ROW_BYTES[layout.remat] / layout.mesh[2]
        return 1.5 * self.state_bytes(layout.mesh) + part * (1 + self.bend * rows)

    def __call__(self, layout: Layout, rows: int) -> dict[str, Any]:
        self.calls.append((layout, rows))
        peak = self.peak(layout, rows)
        fits = peak <= GRANTED
        batch = rows * layout.pieces
        seconds = 5.0 + rows * ROW_SECONDS[layout.remat] * layout.mesh[2] ** -0.9
        if not fits and self.partly:
            peak = GRANTED * 0.7  # The compiler tells only a part of it.
        return {
            "fits": fits,
            "peak_memory_bytes": int(peak),
            "batch_size": batch,
            "samples_per_second": batch / seconds if fits else None,
        }

    def most(self, layout: Layout) -> int:
        rows = 0
        while self.peak(layout, rows + 1) <= GRANTED:
            rows += 1
        return rows


def space(compiler: Compiler, **more: Any) -> Space:
    given: dict[str, Any] = {
        "meshes": [(1, 4, 1)],
        "remats": ["full"],
        "state_bytes": compiler.state_bytes,
        "granted_bytes": GRANTED,
        "first_rows": 16,
    }
    return Space(**given | more)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("rows", [1, 4, 30, 500])
def test_most_rows_are_found_with_few_compiles(remat: str, rows: int) -> None:
    compiler, layout = Compiler(), Layout((1, 4, 1), remat)
    tries = list(fill(space(compiler), layout, compiler, rows))
    found = max(one.rows for one in tries if one.fits)
    # A step of an eighth, and what is left of the memory on purpose.
    assert compiler.most(layout) * 0.8 <= found <= compiler.most(layout)
    assert len(tries) <= 5


def test_three_compiles_do_where_memory_is_a_line() -> None:
    compiler = Compiler()
    tries = list(fill(space(compiler), Layout((1, 4, 1), "full"), compiler, 4))
    assert [one.fits for one in tries] == [True] * 3
    assert tries[-1].rows == 96  # 100 fit; steps are of 8 there


@pytest.mark.parametrize("more", [{"bend": 0.005}, {"partly": True}, {"bend": -0.001}])
@pytest.mark.parametrize("rows", [2, 512])
def test_memory_that_is_no_line_ends_all_the_same(more: dict[str, Any], rows: int) -> None:
    compiler, layout = Compiler(**more), Layout((1, 4, 1), "full")
    tries = list(fill(space(compiler), layout, compiler, rows))
    assert len(tries) <= MOST
    assert len({one.rows for one in tries}) == len(tries)
    assert max(one.rows for one in tries if one.fits) >= compiler.most(layout) // 2


def test_nothing_fits() -> None:
    compiler = Compiler(state=12 * GIB)
    tries = list(fill(space(compiler), Layout((1, 4, 1), "full"), compiler, 64))
    assert not any(one.fits for one in tries)
    assert tries[-1].rows == 1
    assert len(tries) <= 3


def test_no_batch_is_larger_than_allowed() -> None:
    compiler = Compiler()
    tries = list(search(space(compiler, most_rows=80), compiler))
    assert max(one.report["batch_size"] for one in tries) == 80
    assert tries[-1].fits


def test_a_compiler_that_fails_ends_a_layout_only() -> None:
    compiler = Compiler()

    def fail(layout: Layout, rows: int) -> dict[str, Any]:
        if layout.remat == "dots":
            return {"fits": False, "error": "crashed"}
        return compiler(layout, rows)

    tries = list(search(space(compiler, remats=["dots", "full"]), fail))
    assert [one.layout.remat for one in tries].count("dots") == 1
    assert best_first(tries)[0].layout.remat == "full"
    assert best_first(tries)[-1].report["error"] == "crashed"


def test_meshes_are_tried_with_the_policy_that_was_fastest() -> None:
    compiler = Compiler()
    meshes = [(1, 4, 1), (2, 2, 1), (1, 2, 2)]
    tries = list(search(space(compiler, meshes=meshes, remats=["none", "full"]), compiler))
    best = best_first(tries)[0]
    speeds = {
        remat: max(t.speed for t in tries if t.layout == Layout((1, 4, 1), remat))
        for remat in ("none", "full")
    }
    fastest = max(speeds, key=speeds.__getitem__)
    later = [t.layout for t in tries if t.layout.mesh != (1, 4, 1)]
    assert {layout.remat for layout in later} == {fastest}
    assert {layout.mesh for layout in later} == set(meshes[1:])
    assert best.speed == max(t.speed for t in tries)
    assert len(tries) <= 4 * 4


def test_what_cannot_hold_the_state_is_not_compiled() -> None:
    compiler = Compiler(state=10 * GIB)
    meshes = [(4, 1, 1), (1, 4, 1)]
    tries = list(search(space(compiler, meshes=meshes, remats=["none", "full"]), compiler))
    assert {layout.mesh for layout, _ in compiler.calls} == {(1, 4, 1)}
    [refused] = [one for one in tries if one.layout.mesh == (4, 1, 1)]
    assert "not compiled" in refused.report["error"]
    assert not refused.fits


def test_candidates_come_one_by_one() -> None:
    """So that a search that is stopped has shown what it found."""
    compiler = Compiler()
    tries = search(space(compiler), compiler)
    for number in (1, 2):
        assert next(tries).fits
        assert len(compiler.calls) == number


def state_of(size: float) -> Callable[[Mesh], int]:
    return lambda mesh: int(size / (mesh[1] * mesh[2]))


def test_likely_meshes() -> None:
    found = likely_meshes(32, 2, state_of(60 * GIB), GRANTED)
    assert found == [(2, 16, 1), (4, 8, 1), (2, 8, 2), (4, 4, 2), (2, 4, 4), (4, 2, 4)]
    # Of a small model every device holds all; of a large one all hold it together.
    assert (4, 1, 1) in likely_meshes(4, 1, state_of(GIB), GRANTED)
    assert likely_meshes(4, 1, state_of(900 * GIB), GRANTED) == [(1, 4, 1), (1, 2, 2), (1, 1, 4)]


def test_rows_are_tried_in_steps() -> None:
    assert [nice(n) for n in (0, 1, 15, 17, 31, 33, 100, 1000)] == [0, 1, 15, 16, 30, 32, 96, 960]


def test_a_layout_is_settings_of_a_recipe() -> None:
    assert Layout((2, 8, 2), "dots").overrides(3, 4) == (
        "mesh.data=2",
        "mesh.fsdp=8",
        "mesh.tensor=2",
        "model.remat=dots",
        "data.batch_size=192",
    )
