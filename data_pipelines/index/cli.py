"""`lara data index`: makes the index of a dataset's splits, or checks the one there is."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipelines import catalog, storage
from data_pipelines.annotate.readers import open_provider
from data_pipelines.cli import at_least_one, option
from data_pipelines.index.build import build_index, splits_of
from data_pipelines.index.format import FLAGS, HEADER_FILE, Index
from data_pipelines.index.shared import send


def main(argv: Sequence[str]) -> int:
    """Runs `lara data index`; prints the folder of each index on standard output.

    Returns:
      0; 1 if a file could not be written or read, such as on a full disk.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.max_bad_fraction is not None and not arguments.decode_frames:
        parser.error("--max-bad-fraction needs --decode-frames")
    if arguments.mixture and arguments.name:
        parser.error("--mixture names its datasets; --name is for one")
    if arguments.mixture and arguments.annotations:
        parser.error("--annotations are of one dataset; attach those of a mixture one by one")
    if storage.exists(storage.join(arguments.source, HEADER_FILE)):
        raise ValueError(f"{arguments.source} is the folder of an index; name that of its data")
    arguments.provider = open_provider(arguments.annotations) if arguments.annotations else None
    for entry in catalog.entries(
        arguments.source,
        mixture=arguments.mixture or "",
        definitions=arguments.definitions or "",
    ):
        out, name = arguments.out, entry.name or arguments.name
        if out is not None and arguments.mixture:
            out = storage.join(out, entry.name or "")
        for split in arguments.split or splits_of(entry.path):
            try:
                _index(arguments, entry.path, split, name, out and storage.join(out, split))
            except (FileNotFoundError, PermissionError):
                raise  # a wrong call
            except (OSError, BrokenProcessPool) as error:
                print(f"lara data index: {error}; run again, it goes on from here", file=sys.stderr)
                return 1
    return 0


def _index(
    arguments: argparse.Namespace, path: str, split: str, name: str | None, out: str | None
) -> None:
    """Makes the index of a split and says what it holds; one for a URL is made here, then sent."""
    started = time.perf_counter()
    remote = out is not None and not storage.is_local(out)
    index = build_index(
        path,
        split,
        storage.absolute(out) if out is not None and not remote else None,
        name=name,
        definitions=arguments.definitions,
        annotations=arguments.provider,
        workers=arguments.workers,
        decode_frames=arguments.decode_frames,
        max_bad_fraction=arguments.max_bad_fraction,
        verify=arguments.verify,
    )
    if out is not None and remote:
        send(index, out)
    facts = summary(index) | {"folder": out if remote else str(index.folder)}
    print(describe(facts), file=sys.stderr)
    seconds = round(time.perf_counter() - started, 3)
    print(json.dumps(facts | {"seconds": seconds}) if arguments.json else facts["folder"])


def summary(index: Index) -> dict[str, Any]:
    """What an index holds, and what its filters would drop, as plain values."""
    header, spec = index.header, index.spec
    return {
        "folder": str(index.folder),
        "source": header.source,
        "dataset": header.dataset,
        "version": header.version,
        "split": header.split,
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
    """A summary for people, three lines, and one for annotations that were attached."""
    rows, filters = facts["rows"], facts["filters"]
    absent = ", ".join(facts["absent_cameras"])
    drops = (f"{name} {filters[name]} ({filters[name] / rows:.1%})" for name in FLAGS)
    left_out, attached = facts["left_out_episodes"], "from" in facts["annotations"]
    return (
        f"{facts['dataset']} {facts['version']} {facts['split']}: {facts['episodes']} episodes, "
        f"{rows} rows of {facts['stored_steps']} steps; {facts['empty_episodes']} episodes "
        f"without rows, {facts['dropped_steps']} steps that are no rows"
        f"{f'; {left_out} episodes that its definition leaves out' if left_out else ''}\n"
        f"cameras: {', '.join(facts['cameras'])}"
        f"{f'; in the definition, but not in the data: {absent}' if absent else ''}\n"
        f"rows that filters would drop: {', '.join(drops)}"
        f"{f'{chr(10)}annotations: {_matched(facts)}' if attached else ''}"
    )


def _matched(facts: dict[str, Any]) -> str:
    """How much of an index the attached annotations cover, and how much not."""
    found = facts["annotations"]
    lacks = " and ".join(f"{facts[name] - found[name]} {name}" for name in ("episodes", "rows"))
    return (
        f"{found['episodes']} episodes and {found['rows']} rows have some from {found['from']}; "
        f"{lacks} have none"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lara data index",
        description="Makes the index of a dataset: one pass over its files, which may be "
        "interrupted and run again. An index that fits the data is kept.",
    )
    parser.add_argument(
        "source",
        help="a TFDS version directory or LeRobot data set; a path or gs://, s3://, ...; with "
        "--mixture, the folder that holds its datasets by name",
    )
    parser.add_argument("--mixture", metavar="NAME", help="built in or from --definitions")
    parser.add_argument("--name", help="of the dataset (default: what its files say)")
    parser.add_argument("--split", nargs="+", metavar="NAME", help="which splits (default: all)")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="a folder or URL, in which each split gets a folder, and with --mixture each dataset "
        "one (default: lara_index in the dataset's directory; $LARA_JAX_CACHE or ~/.cache/lara_jax "
        "where that cannot be written to)",
    )
    parser.add_argument(
        "--workers", type=option(at_least_one), help="processes (default: one a core if it pays)"
    )
    parser.add_argument(
        "--definitions", metavar="FILE.toml", help="datasets besides the built-in ones"
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
        help="read an index that is there and all of the data, and compare their checksums",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a split")
    return parser
