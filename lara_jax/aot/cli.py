"""`lara aot`: what a recipe would need and take on TPUs, without having one.

lara aot --config configs/bridge_4b.py --topology v5p:4x4x4 --config.data.batch_size=256
"""

import argparse
import json
from collections.abc import Sequence

from lara_jax.aot.chips import GIB, topology
from lara_jax.aot.compile import WHATS, Report, compile_recipe
from lara_jax.config import load_recipe, split_overrides


def main(argv: Sequence[str]) -> int:
    """`lara aot --config FILE --topology NAME [--num-slices N] [--what train|policy] [--json]`."""
    parser = argparse.ArgumentParser(prog="lara aot", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe")
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="v5p:4x4x4, v5e:16x16; or v5p-128"
    )
    parser.add_argument(
        "--num-slices", type=int, default=1, metavar="N", help="slices, joined by the network"
    )
    parser.add_argument("--what", choices=WHATS, default="train", help="a step, or a policy call")
    parser.add_argument("--stage", metavar="NAME", help="of the curriculum; else the last one")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args, rest = parser.parse_known_args(argv)
    if args.num_slices < 1:
        raise ValueError(f"--num-slices must be 1 or more, got {args.num_slices}")
    recipe = load_recipe(args.config, split_overrides(rest))
    report = compile_recipe(
        recipe,
        topology(args.topology),
        slices=args.num_slices,
        what=args.what,
        stage=args.stage,
    )
    print(json.dumps(report.json(), indent=1) if args.json else table(report))
    return 0


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
