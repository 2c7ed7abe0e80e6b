"""Our annotation file: one episode a line, JSON, in the order of the episodes.

    {"schema": 1, "key": "/data/x.npy_3", "number": 17,
     "steps": {"0": {"subtask": "move to the spoon", "boxes": [[0.1, 0.2, 0.3, 0.9]],
                     "motion": "Move down. Now move down.", "phase": "approach"}, ...},
     "provenance": {"dataset": "bridge", "split": "train", "stored_steps": 38,
                    "inputs": "9f3c...", ...}}

Steps are counted as they are stored. Boxes are normalised (x1, y1, x2, y2): the object, then the
destination. A line with a key belongs to the episode with that key; one without to the episode with
that number among all of its dataset's split, those without steps counted, too, and then `dataset`,
`split` and `stored_steps` must be there. What `provenance` says of them has to fit the episode;
`dataset` is what the data call themselves, whatever definition they are read by. `inputs` changes
when anything changes that the line depends on.

A line is written whole or not at all: what a killed run left half-written has no line end, and the
next run cuts it off.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.annotate.jsonl import parse_line, scan_lines
from lara_jax.tokenizers.prompt import Annotation, Box

SCHEMA_VERSION = 1
# Detectors round, and clip in float32: a box may stick out of the image by so much of its side.
TOLERANCE = 1e-3
_LINE_START = f'{{"schema": {SCHEMA_VERSION}, '.encode()


def checked_box(
    values: Any,
    where: str,
    *,
    scale: tuple[float, float] = (1.0, 1.0),
    tolerance: float = TOLERANCE,
) -> Box:
    """A box in normalised coordinates, cut to the image where it sticks out by rounding only.

    Args:
      values: [x1, y1, x2, y2].
      where: names it in messages.
      scale: (width, height) of the image in the units of `values`.
      tolerance: how far it may stick out, of the image's side.

    Raises:
      ValueError: it is inverted, lies outside or is no box at all.
    """
    numbers = isinstance(values, Sequence) and all(
        isinstance(x, int | float) and math.isfinite(x) for x in values
    )
    if not numbers or len(values) != 4:
        raise ValueError(f"{where}: a box is 4 numbers x1 y1 x2 y2; got {values}")
    width, height = scale
    x1, y1, x2, y2 = (
        float(value) / side for value, side in zip(values, (width, height) * 2, strict=True)
    )
    if x2 < x1 or y2 < y1:
        raise ValueError(f"{where}: box {list(values)} is inverted (x1 y1 x2 y2)")
    if min(x1, y1) < -tolerance or max(x2, y2) > 1 + tolerance:
        raise ValueError(
            f"{where}: box {list(values)} lies outside the image, [0, {width:g}] x [0, {height:g}]"
        )
    return (max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0))


def checked_step(name: str, stored_steps: int | None, where: str) -> int:
    """A step's number.

    Args:
      name: as the file has it, a key of a JSON object.
      stored_steps: how many the episode has, None where that is not known.
      where: names the episode in messages.

    Raises:
      ValueError: the episode has no such step.
    """
    if name.isdecimal() and (stored_steps is None or int(name) < stored_steps):
        return int(name)
    known = "" if stored_steps is None else f"; the episode has steps 0..{stored_steps - 1}"
    raise ValueError(f"{where}, step {name!r}: there is no such step{known}")


def text_of(values: Mapping[str, Any], name: str, where: str) -> str:
    """A text field; absent or null is the same as empty.

    Raises:
      ValueError: it is something else.
    """
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name!r} should be a text; got {value!r}")
    return value or ""


def object_of(values: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """A field that is a JSON object.

    Raises:
      ValueError: it is absent or something else.
    """
    value = values.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name!r} should be a JSON object; got {value!r:.80}")
    return value


def read_steps(values: Mapping[str, Any], where: str) -> dict[int, Annotation]:
    """The annotations of one line of our file.

    Args:
      values: the parsed line.
      where: names the line in messages, such as "a.jsonl, line 3, episode 'x'".

    Raises:
      ValueError: the line is not as the schema says.
    """
    if values.get("schema") != SCHEMA_VERSION:
        raise ValueError(
            f"{where}: schema {values.get('schema')!r}; this release reads {SCHEMA_VERSION}"
        )
    stored_steps = values.get("provenance", {}).get("stored_steps")
    annotations = {}
    for name, entry in object_of(values, "steps", where).items():
        step = checked_step(name, stored_steps, where)
        place = f"{where}, step {step}"
        if not isinstance(entry, dict):
            raise ValueError(f"{place}: should be a JSON object; got {entry!r:.80}")
        annotations[step] = Annotation(
            subtask=text_of(entry, "subtask", place),
            boxes=tuple(checked_box(box, place) for box in entry.get("boxes") or ()),
            motion=text_of(entry, "motion", place),
        )
    return annotations


class AnnotationWriter:
    """Adds lines to an annotation file, after what an earlier run has left; use it as a context.

    Attributes:
      path: the file.
      kept: by episode's number, the provenance of the lines that were there already and are good.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        is_good: Callable[[Mapping[str, Any]], bool],
        *,
        overwrite: bool = False,
    ) -> None:
        """Opens or makes the file, cuts off a half-written line and lines that are not good.

        Args:
          path: of the file.
          is_good: takes a line, says whether it may stay.
          overwrite: go on if no line may.

        Raises:
          ValueError: the file is another kind of file, all of it would go, or another process is
            writing it.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_locked(self.path)
        self._places: dict[int, tuple[int, int]] = {}
        self.kept: dict[int, Mapping[str, Any]] = {}
        try:
            complete = self._read(is_good)
            if complete and not self.kept and not overwrite:
                raise ValueError(
                    f"{self.path}: all its lines are of other inputs or settings; name another "
                    f"file, or say --overwrite"
                )
        except ValueError:
            self._file.close()
            raise
        self._file.truncate(complete)
        if sum(length for _, length in self._places.values()) != complete:
            self._rewrite()

    def __enter__(self) -> "AnnotationWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, line: Mapping[str, Any]) -> None:
        """Adds the line of one episode and hands it to the operating system, whole."""
        data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        if not data.startswith(_LINE_START):
            raise ValueError(f"{self.path}: a line starts with its schema; got {data[:80]!r}")
        self._places[line["number"]] = (self._file.seek(0, os.SEEK_END), len(data))
        self._file.write(data)
        self._file.flush()

    def finish(self) -> None:
        """Brings the lines into the order of the episodes, if they are not, and to the disk."""
        offsets = [self._places[number][0] for number in sorted(self._places)]
        if offsets != sorted(offsets):
            self._rewrite()
        os.fsync(self._file.fileno())

    def _read(self, is_good: Callable[[Mapping[str, Any]], bool]) -> int:
        """Notes the good lines; returns where the last complete line ends."""
        complete = 0
        for line, data in scan_lines(self.path):
            where = f"{self.path}, line {line.number}"
            if not (data.startswith(_LINE_START) or _LINE_START.startswith(data)):
                raise ValueError(f"{where}: this is no annotation file of this release")
            if not data.endswith(b"\n"):
                break
            complete = line.offset + line.length
            values = parse_line(data, where)
            if is_good(values):
                self._places[values["number"]] = (line.offset, line.length)
                self.kept[values["number"]] = values["provenance"]
        return complete

    def _rewrite(self) -> None:
        """Puts a file with the noted lines, in order, in the place of this one."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.unlink(missing_ok=True)
        file, places = _open_locked(partial), {}
        for number in sorted(self._places):
            offset, length = self._places[number]
            self._file.seek(offset)
            places[number] = (file.tell(), length)
            file.write(self._file.read(length))
        file.flush()
        os.fsync(file.fileno())
        os.replace(partial, self.path)
        self._file.close()
        self._file, self._places = file, places


def _open_locked(path: Path) -> BinaryIO:
    """Opens a file for reading and appending, for this process alone."""
    file = open(path, "a+b")  # noqa: SIM115  # the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{path}: another process is writing this file") from None
    return file
