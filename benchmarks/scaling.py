"""Recipes over TPU slices and numbers of slots: memory, a step's time and MFU, compiled ahead.

    python benchmarks/scaling.py --config configs/oxe_2b.py --config configs/oxe_4b.py \\
        --topology v5e-16,v5p-64,2xv5e-256 --slots 0,3 --fit full --cache runs/aot --plot out.svg

Each number is `lara aot`'s, so that it needs libtpu and no TPU; see docs/scaling.md for what they
mean. With --fit the batch is the largest that fits (`lara aot --search`), else every device has
--rows rows. With a --cache the script goes on where it was stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lara_jax.aot.cli import COLUMNS, row
from lara_jax.aot.plot import check_path, plot_reports
from lara_jax.evals.report import format_table

Report = dict[str, Any]


def reports_of(
    config: str, slots: str, args: argparse.Namespace, rest: Sequence[str]
) -> Iterator[Report]:
    """One for each topology, in their order; of those of a search the best."""
    command = [sys.executable, "-m", "lara_jax.cli", "aot", "--config", config, "--json"]
    command += ["--topology", args.topology, f"--config.model.latent_slots={slots}", *rest]
    command += ["--cache", str(args.cache)] if args.cache else []
    command += ["--rows", str(args.rows)] if args.rows else []
    if args.fit:
        command += ["--search", "--search-remat", args.fit, "--search-mesh", args.mesh]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1):  # 1: something does not fit, which its report says
        raise SystemExit(done.returncode)
    seen = set()
    for report in map(json.loads, done.stdout.splitlines()):
        place = report.get("topology"), report.get("num_slices")
        if place not in seen:
            seen.add(place)
            yield report | {"recipe": Path(config).stem, "latent_slots": int(slots)}


def label(report: Mapping[str, Any]) -> str:
    """The name of a line in the plot."""
    return f"{report['recipe']}, K = {report['latent_slots']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table or JSON lines, and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", action="append", required=True, help="recipes")
    parser.add_argument("--slots", default="3", metavar="K,K", help="latent slots")
    parser.add_argument("--topology", required=True, metavar="A,B", help="as for lara aot")
    parser.add_argument("--rows", type=int, help="of each device; else data.batch_size stays")
    parser.add_argument("--fit", metavar="REMAT", help="the largest batch with this remat policy")
    parser.add_argument("--mesh", default="1x-1x1", help="of a slice, for --fit")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="as for lara aot")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an SVG or PNG")
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    args, rest = parser.parse_known_args(argv)
    if args.plot:
        check_path(args.plot)
    found: list[Report] = []
    for config in args.config:
        for slots in args.slots.split(","):
            for report in reports_of(config, slots, args, rest):
                found.append(report)
                if args.json:
                    print(json.dumps(report), flush=True)
    if not args.json:
        print(format_table(("recipe", *COLUMNS), [[label(one), *row(one)] for one in found]))
    if args.plot:
        series = {name: [one for one in found if label(one) == name] for name in map(label, found)}
        plot_reports(series, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
