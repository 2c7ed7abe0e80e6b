"""`lara checkpoint`: what a run has saved, whether it is whole, and what may go.

lara checkpoint ls runs/debug --check

      step          size  kind         loss_action  integrity
       400       0.5 MiB  training           0.213  ok
       500       0.5 MiB  training               -  damaged: params/d/1a has changed
300.damaged: damaged, set aside
600.orbax-checkpoint-tmp: cut off, or still being written
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lara_jax import checkpoint_files as files
from lara_jax.checkpoint import (
    difference,
    digest,
    flatten,
    load_info,
    load_metrics,
    load_params,
)
from lara_jax.checkpoint_files import find


def main(argv: Sequence[str]) -> int:
    """`lara checkpoint ls|verify|rm|compare`."""
    parser = argparse.ArgumentParser(prog="lara checkpoint", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, line in (
        ("ls", "list the checkpoints of a run"),
        ("verify", "check files and numbers; the last line is the parameters' SHA-256"),
        ("rm", "delete a checkpoint, or all that no run can use"),
    ):
        sub = verbs.add_parser(verb, help=line, description=line)
        sub.add_argument("directory", metavar="DIR")
        if verb == "ls":
            sub.add_argument("--json", action="store_true", help="one object a line")
            sub.add_argument("--check", action="store_true", help="compare files with checksums")
            sub.add_argument("--metric", metavar="NAME", help="shown; checkpoint.best_metric else")
        elif verb == "verify":
            sub.add_argument("--step", type=int)
            sub.add_argument("--digest", action="store_true", help="print only the SHA-256")
        else:
            which = sub.add_mutually_exclusive_group(required=True)
            which.add_argument("--step", type=int)
            which.add_argument(
                "--damaged",
                action="store_true",
                help="all that were set aside, cut off, or are incomplete; not while the run goes",
            )
    sub = verbs.add_parser("compare", help="exit 1 if the parameters of A and B differ")
    sub.add_argument("a", metavar="A")
    sub.add_argument("b", metavar="B")
    sub.add_argument("--rtol", type=float, default=0.0, help="of a parameter's largest entry")
    args = parser.parse_args(argv)
    return {"ls": _ls, "verify": _verify, "rm": _rm, "compare": _compare}[args.verb](args)


def verify(folder: Path) -> list[str]:
    """Checks files against their checksums, and parameters for finite float32 numbers.

    Returns:
      What is wrong, one line each; nothing when all is well.
    """
    wrong = files.damage(folder)
    if wrong:
        return wrong
    for path, value in flatten(load_params(folder)).items():
        if value.dtype != np.float32:
            wrong.append(f"{path} is {value.dtype}, not float32")
        elif not np.isfinite(value).all():
            wrong.append(f"{path} has values that are not finite")
    return wrong


def _ls(args: argparse.Namespace) -> int:
    root = _root(args.directory)
    rows = [_row(root / str(step), check=args.check) for step in files.steps(root)]
    rest = _unusable(root)
    if not rows and not rest:
        raise FileNotFoundError(f"no checkpoint in {args.directory}")
    if args.json:
        rows += [{"step": None, "kind": kind, "path": str(path)} for path, kind in rest.items()]
        print(*map(json.dumps, rows), sep="\n")
        return 0
    name = args.metric or _best_metric(root)
    print(f"{'step':>10}  {'size':>14}  {'kind':<12}  {name:>12}  integrity")
    for row in rows:
        size, value = f"{row['bytes'] / 2**20:.1f} MiB", row["metrics"].get(name)
        shown = "-" if value is None else f"{value:.4g}"
        print(f"{row['step']:>10}  {size:>14}  {row['kind']:<12}  {shown:>12}  {row['integrity']}")
    for path, kind in rest.items():
        print(f"{path.name}: {kind}")
    return 0


def _best_metric(root: Path) -> str:
    """What the newest recipe that can be read calls the best checkpoint by, or the loss."""
    for step in reversed(files.steps(root)):
        with contextlib.suppress(OSError, ValueError):  # damaged: its row says so
            return load_info(root, step).recipe.checkpoint.best_metric or "loss"
    return "loss"


def _unusable(root: Path) -> dict[Path, str]:
    """Folders that no run goes on from, and what they are."""
    found = {root / str(step): "incomplete" for step in files.incomplete(root)}
    found |= dict.fromkeys(files.cut_off(root), "cut off, or still being written")
    return found | dict.fromkeys(files.set_aside(root), "damaged, set aside")


def _row(folder: Path, *, check: bool) -> dict[str, Any]:
    """What `ls` says of a complete checkpoint; its small files are compared in any case."""
    wrong = files.damage(folder, () if check else files.JSON_ITEMS)
    integrity = f"damaged: {wrong[0]}" if wrong else "ok" if check else "not checked"
    return {
        "step": int(folder.name),
        "bytes": files.size_bytes(folder),
        "kind": "training" if (folder / "training").is_dir() else "params only",
        "metrics": {} if wrong else dict(load_metrics(folder)),
        "integrity": integrity,
        "path": str(folder),
    }


def _verify(args: argparse.Namespace) -> int:
    folder = find(args.directory, args.step)
    wrong = verify(folder)
    for line in wrong:
        print(f"{folder}: {line}", file=sys.stderr)
    if wrong:
        return 1
    params = load_params(folder)
    if not args.digest:
        flat = flatten(params)
        count = sum(value.size for value in flat.values())
        print(f"{folder}: {len(flat)} arrays, {count:,} parameters, all files as written")
    print(digest(params))
    return 0


def _rm(args: argparse.Namespace) -> int:
    root = _root(args.directory)
    unusable = _unusable(root)
    known = sorted({*files.steps(root), *files.incomplete(root)})
    if args.damaged and not unusable:
        raise FileNotFoundError(f"nothing in {root} was set aside, cut off, or is incomplete")
    if not args.damaged and args.step not in known:
        more = f"; --damaged deletes {', '.join(p.name for p in unusable)}" if unusable else ""
        raise FileNotFoundError(
            f"no checkpoint of step {args.step} in {root}; there are {known}{more}"
        )
    for folder in unusable if args.damaged else (root / str(args.step),):
        shutil.rmtree(folder)
        print(f"deleted {folder}", file=sys.stderr)
    return 0


def _compare(args: argparse.Namespace) -> int:
    error, path = difference(load_params(args.a), load_params(args.b))
    close = error <= args.rtol
    verdict = "within" if close else "over"
    print(f"largest relative difference {error:.3g} ({path or 'equal'}), {verdict} {args.rtol:g}")
    return 0 if close else 1


def _root(directory: str) -> Path:
    """The folder with a run's checkpoints, given it, the run's or that of one of them."""
    path = Path(directory).absolute()
    if files.is_complete(path):
        return path.parent
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path
