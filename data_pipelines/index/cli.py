"""`lara data index`: makes the index of a dataset's splits, or checks the one there is."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_pipelines.annotate.readers import open_provider
from data_pipelines.index.build import build_index, splits_of
from data_pipelines.index.format import FLAGS, Index


def main(argv: Sequence[str]) -> int:
    """Runs `lara data index`; prints the folder of each index on standard output.

    Returns:
      0; 1 if a file could not be written or read, such as on a full disk.
    """
    arguments = _parser().parse_args(argv)
    provider = open_provider(arguments.annotations) if arguments.annotations else None
    for split in arguments.split or splits_of(arguments.source):
        started = time.perf_counter()
        try:
            index = build_index(
                arguments.source,
                split,
                arguments.out / split if arguments.out is not None else None,
                definitions=arguments.definitions,
                annotations=provider,
                workers=arguments.workers,
                decode_frames=arguments.decode_frames,
                max_bad_fraction=arguments.max_bad_fraction,
                verify=arguments.verify,
            )
        except (FileNotFoundError, PermissionError):
            raise  # a wrong call
        except (OSError, BrokenProcessPool) as error:
            print(f"lara data index: {error}; run again, it goes on from here", file=sys.stderr)
            return 1
        facts = summary(index)
        print(describe(facts), file=sys.stderr)
        seconds = round(time.perf_counter() - started, 3)
        print(json.dumps(facts | {"seconds": seconds}) if arguments.json else index.folder)
    return 0


def summary(index: Index) -> dict[str, Any]:
    """What an index holds, and what its filters would drop, as plain values."""
    header, spec = index.header, index.spec
    return {
        "folder": str(index.folder),
        "source": header.source,
        "dataset": header.dataset,
        "version": header.version,
        "split": header.split,
        "definition": spec.name,
        "cameras": list(header.cameras),
        "absent_cameras": [camera for camera in spec.cameras if camera not in header.cameras],
        "files": len(header.files),
        "bytes": sum(file.size for file in header.files),
        **{name: n for name, n in header.counts.items() if not name.startswith("flag:")},
        "filters": index.filter_counts,
        "decoded": header.decoded,
        "annotations": dict(header.annotations),
        "digest": header.digest,
    }


def describe(facts: dict[str, Any]) -> str:
    """A summary for people, three lines."""
    rows, filters = facts["rows"], facts["filters"]
    absent = ", ".join(facts["absent_cameras"])
    drops = (f"{name} {filters[name]} ({filters[name] / rows:.1%})" for name in FLAGS)
    return (
        f"{facts['dataset']} {facts['version']} {facts['split']}: {facts['episodes']} episodes, "
        f"{rows} rows of {facts['stored_steps']} steps; {facts['empty_episodes']} episodes "
        f"without rows, {facts['dropped_steps']} steps that are no rows\n"
        f"cameras: {', '.join(facts['cameras'])}"
        f"{f'; in the definition, but not in the data: {absent}' if absent else ''}\n"
        f"rows that filters would drop: {', '.join(drops)}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lara data index",
        description="Makes the index of a dataset: one pass over its files, which may be "
        "interrupted and run again. An index that fits the data is kept.",
    )
    parser.add_argument(
        "source", help="a TFDS version directory or LeRobot data set; a path or gs://, s3://, ..."
    )
    parser.add_argument("--split", nargs="+", metavar="NAME", help="which splits (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where, one folder a split (default: lara_index in the dataset's directory; "
        "$LARA_JAX_CACHE or ~/.cache/lara_jax where that cannot be written to)",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a core if it pays)")
    parser.add_argument(
        "--definitions", type=Path, metavar="FILE.toml", help="datasets besides the built-in ones"
    )
    parser.add_argument(
        "--annotations", metavar="KIND:PATH", help="reasoning from files: lara:, ecot: or own:"
    )
    parser.add_argument(
        "--decode-frames",
        action="store_true",
        help="decode every frame; one that does not decode is an error",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        metavar="F",
        help="with --decode-frames: flag rows that need a broken frame instead, and fail only if "
        "they are more than this fraction of all rows",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare all checksums of an index that is there, and those in the data's records",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a split")
    return parser
