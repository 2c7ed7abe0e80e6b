"""Annotations in parts: a run of episodes each, for workers that share nothing but a folder.

    OUTPUT.parts/00000000.jsonl    episodes 0 to 63       as lines of the annotation file
    OUTPUT.parts/00000064.jsonl    episodes 64 to 127
    ...                                                   -> OUTPUT, in the order of the episodes

A part stays until all are there: a job that was killed goes on with the episodes whose lines are
missing or were made of something else.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from data_pipelines import storage
from data_pipelines.annotate.annotate import detector_named, writer_named
from data_pipelines.annotate.episode import (
    AnnotateSettings,
    annotate_episode,
    is_up_to_date,
)
from data_pipelines.annotate.jsonl import parse_line
from data_pipelines.annotate.view import EpisodeView
from data_pipelines.annotate.writers import BoxDetector, SubtaskWriter
from data_pipelines.convert.output import write_text
from data_pipelines.convert.shared_index import shared_index
from data_pipelines.index.format import Index

EPISODES_PER_PART = 64


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Who annotates, and how; each process makes its models when it first needs them.

    Attributes:
      writer, detector: as `lara data annotate --writer` and `--detector` take them.
      settings: the robot's frame, how often to look.
    """

    writer: str = "rules"
    detector: str = "none"
    settings: AnnotateSettings = field(default_factory=AnnotateSettings)

    def line(self, index: Index, number: int) -> dict[str, Any]:
        """The line of one episode."""
        models = _models(self.writer, self.detector)
        return annotate_episode(EpisodeView.from_index(index, number), *models, self.settings)

    def made(self, index: Index, line: Mapping[str, Any]) -> bool:
        """True if a line is what `line` would give again."""
        return is_up_to_date(line, index, *_models(self.writer, self.detector), self.settings)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part: its file, and the numbers of the episodes that it is to hold."""

    file: str
    episodes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WrittenPart:
    """A part that is there: its file, and how many of its episodes an earlier run had done."""

    file: str
    already_done: int


def parts_of(episodes: Sequence[int], folder: str) -> list[Part]:
    """Divides episodes, ascending, into parts; the same episode is always in the same part."""
    parts: dict[int, list[int]] = {}
    for number in episodes:
        parts.setdefault(number // EPISODES_PER_PART, []).append(number)
    return [
        Part(
            file=storage.join(folder, f"{part * EPISODES_PER_PART:08d}.jsonl"),
            episodes=tuple(numbers),
        )
        for part, numbers in parts.items()
    ]


def write_part(index_folder: str, source: str, annotator: Annotator, part: Part) -> WrittenPart:
    """Annotates the episodes of a part that it does not have yet.

    Args:
      index_folder, source: of the index: its own place, and that of the data.
      annotator: who annotates.
      part: which episodes.
    """
    index = shared_index(index_folder, source)
    found = read_part(part.file) if storage.exists(part.file) else ()
    lines = {line["number"]: line for line in found if annotator.made(index, line)}
    missing = [number for number in part.episodes if number not in lines]
    lines |= {number: annotator.line(index, number) for number in missing}
    texts = (json.dumps(lines[number], ensure_ascii=False) for number in part.episodes)
    write_text(part.file, "".join(f"{text}\n" for text in texts))
    return WrittenPart(file=part.file, already_done=len(part.episodes) - len(missing))


def read_part(file: str) -> Iterator[dict[str, Any]]:
    """The lines of a part."""
    for number, text in enumerate(storage.read_text(file).splitlines(), 1):
        yield parse_line(text.encode(), f"{file}, line {number}")


@lru_cache(maxsize=1)
def _models(writer: str, detector: str) -> tuple[SubtaskWriter, BoxDetector | None]:
    return writer_named(writer), detector_named(detector)
