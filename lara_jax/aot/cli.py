"""`lara aot`: what a recipe would need and take on TPUs, without having one.

lara aot --config configs/bridge_4b.py --topology v5p:4x4x4 --config.data.batch_size=256
lara aot --config configs/bridge_4b.py --topology v5e-16,v5p-64,2xv5e-64 --plot out.svg
lara aot --config configs/bridge_4b.py --topology v5p-64 --search --cache runs/aot
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lara_jax import sharding
from lara_jax.aot.chips import GIB, slices_of
from lara_jax.aot.compile import WHATS, Report, compile_recipe, state_size
from lara_jax.aot.jobs import Job, compile_job
from lara_jax.aot.plot import check_path, place, plot_reports
from lara_jax.aot.search import (
    MOST,
    UNBOUNDED,
    Layout,
    Mesh,
    Space,
    Try,
    best_first,
    likely_meshes,
    search,
)
from lara_jax.config import split_overrides
from lara_jax.evals.report import format_table

REMATS = ("none", "dots", "full", "offload")
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """What `lara aot` takes beside `--config.section.key=value`."""
    made = argparse.ArgumentParser(prog="lara aot", allow_abbrev=False)
    add = made.add_argument
    add("--config", required=True, metavar="FILE", help="a recipe")
    add(
        "--topology",
        required=True,
        action="append",
        metavar="NAME",
        help="v5p:4x4x4, v5e:16x16; or v5p-128; 2xv5e-256 for two slices; several with commas",
    )
    add("--num-slices", type=int, default=1, metavar="N", help="slices, joined by the network")
    add("--what", choices=WHATS, default="train", help="a step, or a policy call")
    add("--stage", metavar="NAME", help="of the curriculum; else the last one")
    add("--rows", type=int, metavar="N", help="of each data x fsdp piece, not data.batch_size")
    add("--search", action="store_true", help="find the largest batch and the fastest layout")
    add("--search-remat", metavar="A,B", help=f"of {', '.join(REMATS)}; all if not given")
    add("--search-mesh", metavar="A,B", help="data x fsdp x tensor each, as in 1x-1x1,2x4x2")
    add("--search-batch", type=int, metavar="N", help="no batch larger than this")
    add("--cache", type=Path, metavar="DIR", help="keeps reports, and takes them from there")
    add("--plot", type=Path, metavar="FILE", help="an SVG or PNG over the topologies")
    add("--json", action="store_true", help="print JSON, an object a line")
    return made


def main(argv: Sequence[str]) -> int:
    """`lara aot --config FILE --topology NAME [--num-slices N] [--what train|policy] [--json]`."""
    args, rest = parser().parse_known_args(argv)
    for name in ("num_slices", "rows", "search_batch"):
        given = getattr(args, name)
        if given is not None and given < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {given}")
    if args.plot:
        check_path(args.plot)
    several = [name for given in args.topology for name in given.split(",")]
    jobs = [
        _job(args, *slices_of(name, args.num_slices), split_overrides(rest), alone=not several[1:])
        for name in several
    ]
    if not args.search and (args.search_remat or args.search_mesh or args.search_batch):
        raise ValueError("--search-remat, --search-mesh and --search-batch need --search")
    if len(jobs) == 1 and not (args.search or args.cache or args.plot):
        [job] = jobs
        report = compile_recipe(
            job.recipe, job.topology, slices=job.slices, what=job.what, stage=job.stage
        )
        print(json.dumps(report.json()) if args.json else table(report))
        return 0
    try:
        return _search(args, jobs) if args.search else _sweep(args, jobs)
    except KeyboardInterrupt:
        kept = f"; what was compiled is kept in {args.cache}" if args.cache else ""
        print(f"lara aot: stopped{kept}", file=sys.stderr)
        return INTERRUPTED


def _job(
    args: argparse.Namespace, topology: Any, slices: int, overrides: Sequence[str], *, alone: bool
) -> Job:
    """One topology's. Among several, the recipe's `mesh.data` is that of one slice."""
    job = Job(
        config=args.config,
        topology=topology,
        slices=slices,
        overrides=tuple(overrides),
        what=args.what,
        stage=args.stage,
    )
    recipe = job.recipe
    if recipe.mesh.data != -1 and not alone and slices > 1:
        job = job.but(f"mesh.data={recipe.mesh.data * slices}")
    if args.rows and not args.search:
        shape = _shape(job)
        pieces = shape["data"] * shape["fsdp"] * recipe.train.accumulate_steps
        job = job.but(f"data.batch_size={args.rows * pieces}")
    return job


def _shape(job: Job) -> dict[str, int]:
    mesh = job.recipe.mesh
    return sharding.mesh_shape(mesh.data, mesh.fsdp, mesh.tensor, job.devices)


def _sweep(args: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """Every topology as the recipe is."""
    reports: list[dict[str, Any]] = []
    try:
        with tqdm(jobs, unit="compile", file=sys.stderr) as bar:
            for job in bar:
                bar.set_postfix_str(f"{job.slices} x {job.topology.name}")
                reports.append(compile_job(job, args.cache))
                if args.json:
                    print(json.dumps(reports[-1]), flush=True)
    finally:
        if not args.json:
            rows = [row(report) for report in reports]
            print("\n".join([format_table(COLUMNS, rows), *_errors(reports)]))
    if args.plot:
        plot_reports({Path(args.config).stem: reports}, args.plot)
    return int(any("error" in report for report in reports))


def _search(args: argparse.Namespace, jobs: Sequence[Job]) -> int:
    """The best of every topology, all candidates beside it."""
    if args.what != "train":
        raise ValueError("--search is for --what train: a policy call has one row and one device")
    best: list[dict[str, Any]] = []
    for job in jobs:
        space, tries = space_of(args, job), list[Try]()
        try:
            _look(args, job, space, tries)
        finally:
            ordered = best_first(tries)
            if args.json:
                print("".join(f"{json.dumps(one.json())}\n" for one in ordered), end="")
            else:
                print(summary(job, ordered))
        best += [one.json() for one in ordered[:1] if one.fits]
    if args.plot and best:
        plot_reports({Path(args.config).stem: best}, args.plot)
    return int(len(best) < len(jobs))


def _look(args: argparse.Namespace, job: Job, space: Space, tries: list[Try]) -> None:
    """Searches one topology, and tells how it goes on standard error."""
    recipe = job.recipe
    print(
        f"{job.slices} x {job.topology.name}: {space.layouts} layouts, about 3 compiles each, "
        f"{MOST} at most",
        file=sys.stderr,
    )
    with tqdm(unit="compile", file=sys.stderr) as bar:

        def attempt(layout: Layout, rows: int) -> dict[str, Any]:
            bar.set_postfix_str(f"{layout}, {rows} rows")
            overrides = layout.overrides(rows, recipe.train.accumulate_steps)
            return compile_job(job.but(*overrides), args.cache)

        for one in search(space, attempt):
            tries.append(one)
            bar.update(int(one.rows > 0))
            bar.write(_line(one), file=sys.stderr)


def space_of(args: argparse.Namespace, job: Job) -> Space:
    """What to search: all that is likely, or what the options name.

    Raises:
      ValueError: an option that is not understood.
    """
    recipe, granted = job.recipe, job.topology.chip.granted_bytes
    size = state_size(recipe, job.stage)
    if args.search_mesh:
        meshes = [_mesh(text, job) for text in args.search_mesh.split(",")]
    else:
        meshes = likely_meshes(job.devices, job.slices, size, granted)
    remats = [recipe.model.remat, *(name for name in REMATS if name != recipe.model.remat)]
    if args.search_remat:
        remats = args.search_remat.split(",")
        for name in remats:
            if name not in REMATS:
                raise ValueError(f"--search-remat {name!r}; allowed: {', '.join(REMATS)}")
    steps = recipe.train.accumulate_steps
    return Space(
        meshes=meshes,
        remats=remats,
        state_bytes=size,
        granted_bytes=granted,
        first_rows=args.rows * meshes[0][0] * meshes[0][1]
        if args.rows
        else recipe.data.batch_size // steps,
        most_rows=args.search_batch // steps if args.search_batch else UNBOUNDED,
    )


def _mesh(text: str, job: Job) -> Mesh:
    """Of a slice; data is then that of all of them."""
    found = re.fullmatch(r"(-1|\d+)x(-1|\d+)x(-1|\d+)", text)
    if not found:
        raise ValueError(f"--search-mesh {text!r}; give data x fsdp x tensor, as in 1x-1x1")
    data, fsdp, tensor = (int(size) for size in found.groups())
    shape = sharding.mesh_shape(data, fsdp, tensor, job.topology.devices)
    return shape["data"] * job.slices, shape["fsdp"], shape["tensor"]


COLUMNS = ("slices", "mesh", "remat", "batch", "GiB", "of", "step ms", "samples/s", "MFU %", "GB")


def row(report: Mapping[str, Any]) -> list[object]:
    """A report in a table; GB are those that a device sends in a step."""
    missing = "-"

    def number(name: str, factor: float = 1.0) -> object:
        value = report.get(name)
        return missing if value is None else f"{value * factor:.4g}"

    mesh = report.get("mesh")
    fits = "" if report["fits"] else " NO"
    return [
        place(report).replace("\n", ", ") if "topology" in report else missing,
        "x".join(map(str, mesh.values())) if mesh else missing,
        report.get("remat", missing),
        report.get("batch_size", missing),
        number("peak_memory_bytes", 1 / GIB) if "peak_memory_bytes" in report else missing,
        str(number("hbm_bytes", 1 / GIB)) + fits,
        number("estimated_step_seconds", 1e3),
        number("samples_per_second"),
        number("mfu", 1e2),
        number("collective_bytes", 1e-9),
    ]


def summary(job: Job, ordered: Sequence[Try]) -> str:
    """The candidates in a table, best first, and how to run the best."""
    lines = [f"{job.slices} x {job.topology.name}, {job.devices} devices", ""]
    lines.append(format_table(COLUMNS[1:], [row(one.json())[1:] for one in ordered]))
    lines += _errors([one.json() for one in ordered])
    fitting = [one for one in ordered if one.fits]
    if not fitting:
        return "\n".join([*lines, "", "nothing fits"])
    steps = job.recipe.train.accumulate_steps
    largest = max(fitting, key=lambda one: one.report["batch_size"])
    for name, one in (("fastest", fitting[0]), ("largest batch", largest)):
        settings = (f"--config.{text}" for text in one.layout.overrides(one.rows, steps))
        lines += ["", f"{name}: {' '.join(settings)}"]
    return "\n".join(lines)


def _errors(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{report.get('topology', '')} {report.get('mesh', '')}: {report['error']}".strip()
        for report in reports
        if "error" in report
    ]


def _line(one: Try) -> str:
    """A candidate as soon as it is known."""
    if "error" in one.report:
        return f"{one.layout}: {one.report['error']}"
    peak = one.report["peak_memory_bytes"] / GIB
    speed = f", {one.speed:.4g} samples/s at most" if one.fits else ", does not fit"
    return f"{one.layout}, {one.rows} rows: {peak:.3f} GiB{speed}"


def table(report: Report) -> str:
    """The report for reading; bytes and FLOPs are of one device."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    memory, hbm = report.memory, report.topology.chip.hbm_bytes
    verdict = "fits" if report.fits else "does NOT fit"
    lines = [
        f"{report.slices} x {report.topology.name}: {report.devices} devices, {mesh}",
        f"stage {report.stage}, {report.rows} rows, remat {report.remat}, compiled in "
        f"{report.seconds:.0f} s",
        "",
        f"peak memory     {memory.peak / GIB:10.3f} GiB of {hbm / GIB:.0f}: {verdict}",
    ]
    if memory.arguments is not None and memory.temporaries is not None:
        lines += [
            f"  arguments     {memory.arguments / GIB:10.3f} GiB",
            f"  temporaries   {memory.temporaries / GIB:10.3f} GiB",
        ]
    if report.census is None or report.estimate is None:
        return "\n".join(lines)
    counted, took = report.census, report.estimate
    off = counted.flops / (report.analytic.hardware / report.devices) - 1
    lines += [
        f"FLOPs           {counted.flops / 1e9:10.3f} G ({off:+.1%} of what sizes say)",
        f"memory traffic  {counted.bytes / 1e9:10.3f} GB",
        "",
        f"{'collective':<20}{'count':>8}{'overlap':>9}{'ICI GB':>10}{'DCN GB':>10}",
    ]
    lines += [
        f"{kind:<20}{one.count:>8}{one.overlapped:>9}{one.sent.ici / 1e9:>10.3f}"
        f"{one.sent.dcn / 1e9:>10.3f}"
        for kind, one in sorted(report.traffic.items())
    ]
    lines += [
        "",
        f"operations      {took.operations * 1e3:10.3f} ms (products at the peak rate "
        f"{took.compute * 1e3:.3f}, memory {took.memory * 1e3:.3f})",
        f"exchanges       {took.exposed * 1e3:10.3f} ms, and {took.hidden * 1e3:.3f} overlapped",
        f"step, at least  {took.step * 1e3:10.3f} ms, MFU at most {report.mfu:.1%}",
    ]
    lines += [f"{name}: trips not known, counted once" for name in counted.unknown_loops]
    return "\n".join(lines)
