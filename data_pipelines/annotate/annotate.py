"""`lara data annotate`: makes the reasoning annotations that a dataset does not have.

    lara data annotate DIR --out bridge.jsonl
    lara data annotate DIR --out bridge.jsonl --writer openai:http://127.0.0.1:8000/v1,qwen3-vl \
        --detector zero-shot:/models/owlv2 --workers 8

An episode is a line of the result (`data_pipelines.annotate.schema`). Episodes are worked on by
threads, for a model's answer is mostly waited for, and written in their order. Lines that are there
already stay if what they were made of has not changed; so a run that was killed goes on where it
stopped, and ends with the same bytes as one that was not.
"""

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipelines.annotate.episode import (
    AnnotateSettings,
    annotate_episode,
    is_up_to_date,
    totals,
)
from data_pipelines.annotate.motion import Axes
from data_pipelines.annotate.openai_endpoint import (
    Endpoint,
    EndpointDetector,
    EndpointError,
    EndpointWriter,
)
from data_pipelines.annotate.schema import AnnotationWriter
from data_pipelines.annotate.view import EpisodeView
from data_pipelines.annotate.writers import BoxDetector, RuleWriter, SubtaskWriter
from data_pipelines.cli import at_least_one, option
from data_pipelines.index.build import open_or_build
from data_pipelines.index.format import Index
from data_pipelines.storage import local_path


def annotate_index(
    index: Index,
    out: Path,
    *,
    writer: SubtaskWriter,
    detector: BoxDetector | None,
    settings: AnnotateSettings,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Annotates the episodes of a split that the file does not have yet.

    Args:
      index: of the split.
      out: the annotation file, made or continued.
      writer, detector, settings: as for `annotate_episode`.
      workers: threads.
      overwrite: replace a file all of whose lines are of other inputs.

    Returns:
      What the file holds and lacks (`totals`), and "already_done", episodes of earlier runs.

    Raises:
      ValueError: the file is none of ours, or one of other inputs, or in use.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    numbers = index.episodes["number"].tolist()

    def is_good(line: Mapping[str, Any]) -> bool:
        return is_up_to_date(line, index, writer, detector, settings)

    def annotate(number: int) -> dict[str, Any]:
        view = EpisodeView.from_index(index, number)
        return annotate_episode(view, writer, detector, settings)

    with AnnotationWriter(out, is_good, overwrite=overwrite) as file:
        provenances = dict(file.kept)
        todo = [number for number in numbers if number not in provenances]
        bar = tqdm(total=len(numbers), initial=len(provenances), desc="annotate", unit="episode")
        with bar, ThreadPoolExecutor(workers) as pool:
            for line in _in_order(pool, annotate, todo, ahead=4 * workers):
                file.append(line)
                provenances[line["number"]] = line["provenance"]
                bar.update()
        file.finish()
    return {"already_done": len(numbers) - len(todo), **totals(provenances.values())}


def _in_order(
    pool: ThreadPoolExecutor, work: Any, items: Iterable[int], *, ahead: int
) -> Iterator[dict[str, Any]]:
    """The results in the order of the items, with a bounded number of them under way."""
    running: deque[Future[dict[str, Any]]] = deque()
    try:
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) >= ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def writer_named(description: str) -> SubtaskWriter:
    """A subtask writer by "rules" or "openai:URL,MODEL"."""
    if description == "rules":
        return RuleWriter()
    if description.startswith("openai:"):
        return EndpointWriter(endpoint=_endpoint(description))
    raise ValueError(f"writer {description!r}; allowed: rules, openai:URL,MODEL")


def detector_named(description: str) -> BoxDetector | None:
    """A detector by "none", "zero-shot:FOLDER" or "openai:URL,MODEL"."""
    kind, _, rest = description.partition(":")
    if description == "none":
        return None
    if description.startswith("openai:"):
        return EndpointDetector(endpoint=_endpoint(description))
    if kind == "zero-shot" and rest:
        from data_pipelines.annotate.zero_shot_detection import ZeroShotDetector

        try:
            return ZeroShotDetector(local_path(rest, "detector"))
        except ImportError as error:
            raise ValueError(f"detector {description!r}: {error}") from error
    raise ValueError(f"detector {description!r}; allowed: none, zero-shot:FOLDER, openai:URL,MODEL")


def _endpoint(description: str) -> Endpoint:
    url, comma, model = description.removeprefix("openai:").rpartition(",")
    if not comma:
        raise ValueError(f"{description!r} lacks a URL or a model; allowed: openai:URL,MODEL")
    return Endpoint(url=url, model=model)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how to annotate; `settings_of` reads some of them."""
    parser.add_argument("--writer", default="rules", help="rules or openai:URL,MODEL")
    parser.add_argument(
        "--detector", default="none", help="none, zero-shot:FOLDER or openai:URL,MODEL"
    )
    parser.add_argument(
        "--box-every",
        type=option(at_least_one),
        default=1,
        help="look for objects every so many steps",
    )
    parser.add_argument(
        "--axes",
        type=option(Axes.parse),
        default=Axes(),
        help="forward,left,up (default: +x,+y,+z)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file made of other inputs"
    )


def settings_of(arguments: argparse.Namespace) -> AnnotateSettings:
    """The settings that these options name."""
    return AnnotateSettings(axes=arguments.axes, box_every_steps=arguments.box_every)


def summary(result: Mapping[str, Any]) -> list[str]:
    """What an annotation file holds and lacks (`totals`), in lines for people."""
    return [
        f"{result['annotated_steps']} of {result['steps']} steps of {result['episodes']} episodes "
        f"annotated",
        *(f"  {reason}: {steps} steps" for reason, steps in result["missing"].items()),
    ]


def main(argv: Sequence[str]) -> int:
    """Runs `lara data annotate`."""
    parser = argparse.ArgumentParser(
        prog="lara data annotate", description="Makes reasoning annotations of a dataset."
    )
    parser.add_argument(
        "source", metavar="DIR_OR_INDEX", help="dataset (path or URL) or folder of an index"
    )
    parser.add_argument(
        "--out", required=True, type=option(local_path), help="annotation file, .jsonl"
    )
    parser.add_argument("--split", default="train", help="of a dataset (default: train)")
    parser.add_argument(
        "--definitions", metavar="FILE.toml", help="datasets besides the built-in ones"
    )
    parser.add_argument("--name", help="of the dataset, whatever its files call it")
    add_options(parser)
    parser.add_argument("--workers", type=option(at_least_one), default=1, help="threads")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    arguments = parser.parse_args(argv)
    # What cannot be is said before an index is made.
    writer, detector = writer_named(arguments.writer), detector_named(arguments.detector)
    start = time.perf_counter()
    try:
        result = annotate_index(
            open_or_build(
                arguments.source,
                arguments.split,
                name=arguments.name,
                definitions=arguments.definitions,
            ),
            arguments.out,
            writer=writer,
            detector=detector,
            settings=settings_of(arguments),
            workers=arguments.workers,
            overwrite=arguments.overwrite,
        )
    except (FileNotFoundError, PermissionError):
        raise  # a wrong call
    except (EndpointError, OSError) as error:
        print(f"lara data annotate: {error}; run again, it goes on from here", file=sys.stderr)
        return 1
    result |= {"out": str(arguments.out), "seconds": time.perf_counter() - start}
    if arguments.json:
        print(json.dumps(result))
    else:
        done, *lacks = summary(result)
        print(f"{done} in {result['seconds']:.0f} s: {arguments.out}", *lacks, sep="\n")
    return 0
