"""Reasoning annotations from files, by episode and stored step.

    open_provider("lara:captions.jsonl,boxes.jsonl")   LaRA-VLA: one or two files of JSON lines
    open_provider("ecot:embodied_features_bridge.json")   Embodied Chain-of-Thought: one JSON
    open_provider("own:annotations.jsonl")             what `lara data annotate` writes

A provider keeps where each episode lies in its file, not what it says. An episode is found by its
key (ECoT and ours) or by its number (LaRA, and ours where episodes have no keys of their own);
steps are the stored ones, before any is dropped. A number counts all episodes of the split as they
are stored, those without steps, too.

Text i of ECoT was made from stored step i. The loader that came with it looked text i up after
Bridge's first step had been dropped, so it met frame i + 1; here it meets frame i.

Source: LaRA-VLA's PyTorch release (annotation files of its Bridge and LIBERO sets); Embodied
Chain-of-Thought (arXiv 2407.08693), the published features and the scripts that made them.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.annotate.jsonl import LineTable
from data_pipelines.annotate.schema import (
    checked_box,
    checked_step,
    object_of,
    read_steps,
    text_of,
)
from data_pipelines.storage import local_path
from lara_jax.tokenizers.prompt import Annotation, Box

# The key that a LeRobot data set's episodes have here.
_LEROBOT_KEY = re.compile(r"episode_(\d{6,})")
# The side of the images that ECoT's boxes are given in, px.
ECOT_IMAGE_PX = 256
# Its detector's boxes overhang the image by a few pixels where an object is cut off.
ECOT_OVERHANG = 0.05


@dataclass(frozen=True, kw_only=True)
class EpisodeName:
    """What annotation files may know an episode by.

    Attributes:
      key: what identifies it in the dataset; empty where nothing does.
      number: among all episodes of the split, from 0 (EPISODE.number).
      dataset: what the data call themselves, whatever definition they are read by.
      split: of it.
      stored_steps: how many it has.
    """

    key: str
    number: int
    dataset: str
    split: str
    stored_steps: int

    def __str__(self) -> str:
        return f"{self.dataset}, split {self.split!r}, episode {self.number} (key {self.key!r})"


class AnnotationProvider(Protocol):
    """Where the reasoning of a dataset's episodes comes from."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever an answer may."""

    @property
    def description(self) -> str:
        """Its files, as `open_provider` takes them, from the root on."""

    def episode(self, name: EpisodeName) -> Mapping[int, Annotation] | None:
        """The annotations of an episode by stored step, None where it has none.

        Raises:
          ValueError: an entry is malformed, or is of another episode than this one: names file,
            line, episode and step.
        """


def open_provider(description: str) -> AnnotationProvider:
    """A provider by the kind and the paths of its files.

    Args:
      description: "lara:CAPTIONS[,BOXES]", "ecot:FILE" or "own:FILE".

    Raises:
      FileNotFoundError: a file is not there.
      ValueError: the description or a file is malformed, or a file is not a local one.
    """
    kind, _, rest = description.partition(":")
    paths = [local_path(path, "annotations file").absolute() for path in rest.split(",") if path]
    most = {"lara": 2, "ecot": 1, "own": 1}
    if kind not in most or not 1 <= len(paths) <= most[kind]:
        raise ValueError(
            f"annotations {description!r}; allowed: lara:CAPTIONS.jsonl[,BOXES.jsonl], "
            f"ecot:FILE.json, own:FILE.jsonl"
        )
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"annotations {description!r}: there is no file {missing[0]}")
    if kind == "lara":
        return LaraAnnotations.read(*paths)
    if kind == "ecot":
        return EcotAnnotations.read(*paths)
    return OwnAnnotations.read(*paths)


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnAnnotations:
    """Our own file (`data_pipelines.annotate.schema`)."""

    table: LineTable[str | int]

    @classmethod
    def read(cls, path: Path) -> "OwnAnnotations":
        """Opens a file; see `open_provider`."""

        def key_of(line: Mapping[str, Any], where: str) -> str | int:
            return text_of(line, "key", where) or _integer(line, "number", where)

        return cls(table=LineTable.read(path, key_of))

    @property
    def fingerprint(self) -> str:
        """See `AnnotationProvider`; likewise the next one."""
        return _fingerprint("own", self.table.digest)

    @property
    def description(self) -> str:
        return f"own:{self.table.path}"

    def episode(self, name: EpisodeName) -> Mapping[int, Annotation] | None:
        """A line with a key is found by it, one without by its number.

        What a line says of its origin has to fit; one without a key has to say it.
        """
        found = (name.key and self.table.get(name.key)) or self.table.get(name.number)
        if not found:
            return None
        line, where = found
        origin = object_of(line, "provenance", where) if line.get("provenance") else {}
        facts = {"dataset": name.dataset, "stored_steps": name.stored_steps}
        if not line.get("key"):
            facts["split"] = name.split
        for fact, wanted in facts.items():
            given = origin.get(fact)
            if given != wanted and not (given is None and line.get("key")):
                raise ValueError(
                    f"{where}: not of {name}: its provenance has {fact} {given!r}, "
                    f"the episode {wanted!r}"
                )
        return read_steps(line, where)


@dataclass(frozen=True, kw_only=True, eq=False)
class LaraAnnotations:
    """LaRA's captions and boxes, one episode a line, by the episode's number::

        {"episode_index": 7, "steps": {"0": {"subtask": ..., "reasoning": ..., ...}, ...}}
        {"episode_index": 7, "num_steps": 38,
         "dense_labels": {"active_bbox": [null, [x1, y1, x2, y2], ...], "active_bbox2": [...]}}

    The reasoning is the motion text. A step whose texts are both empty has no caption; one with a
    box alone has an annotation of a box alone. A second box without the first is left out, as the
    reference does: it would be taken for the object's.
    """

    captions: LineTable[int]
    boxes: LineTable[int] | None = None

    @classmethod
    def read(cls, captions: Path, boxes: Path | None = None) -> "LaraAnnotations":
        """Opens both files; see `open_provider`."""

        def key_of(line: Mapping[str, Any], where: str) -> int:
            return _integer(line, "episode_index", where)

        return cls(
            captions=LineTable.read(captions, key_of),
            boxes=LineTable.read(boxes, key_of) if boxes else None,
        )

    @property
    def fingerprint(self) -> str:
        """See `AnnotationProvider`; likewise the next one."""
        digests = self.captions.digest + (self.boxes.digest if self.boxes else "")
        return _fingerprint("lara", digests)

    @property
    def description(self) -> str:
        tables = (self.captions, self.boxes) if self.boxes else (self.captions,)
        return "lara:" + ",".join(str(table.path) for table in tables)

    def episode(self, name: EpisodeName) -> Mapping[int, Annotation] | None:
        """Found by the number in a LeRobot episode's key, else by its number in the split."""
        named = _LEROBOT_KEY.fullmatch(name.key)
        number = int(named.group(1)) if named else name.number
        captions = self.captions.get(number)
        boxes = self.boxes.get(number) if self.boxes else None
        stored_steps = _integer(boxes[0], "num_steps", boxes[1]) if boxes else None
        if boxes and not named and stored_steps != name.stored_steps:
            raise ValueError(
                f"{boxes[1]}: not of {name}: the line has {stored_steps} steps, the episode "
                f"{name.stored_steps}"
            )
        by_step = self._boxes(*boxes, stored_steps or 0) if boxes else {}
        texts = self._texts(*captions, stored_steps) if captions else {}
        if not (texts or by_step):
            return None
        annotations = {}
        for step in sorted({*texts, *by_step}):
            subtask, motion = texts.get(step, ("", ""))
            annotations[step] = Annotation(subtask, by_step.get(step, ()), motion)
        return annotations

    def _texts(
        self, line: Mapping[str, Any], where: str, stored_steps: int | None
    ) -> dict[int, tuple[str, str]]:
        """Subtask and motion of the steps that have one of them."""
        texts = {}
        for name, entry in object_of(line, "steps", where).items():
            place = f"{where}, step {name}"
            if not isinstance(entry, dict):
                raise ValueError(f"{place}: should be a JSON object; got {entry!r:.80}")
            both = (text_of(entry, "subtask", place), text_of(entry, "reasoning", place))
            if any(both):
                texts[checked_step(name, stored_steps, where)] = both
        return texts

    def _boxes(
        self, line: Mapping[str, Any], where: str, stored_steps: int
    ) -> dict[int, tuple[Box, ...]]:
        """One or two boxes of the steps that have the first."""
        labels = object_of(line, "dense_labels", where)
        columns = []
        for name in ("active_bbox", "active_bbox2"):
            column = labels.get(name) or [None] * stored_steps
            if not isinstance(column, list) or len(column) != stored_steps:
                raise ValueError(
                    f"{where}: dense_labels.{name} should be a list of num_steps = {stored_steps} "
                    f"boxes; got {column!r:.80}"
                )
            columns.append(column)
        boxes = {}
        for step, pair in enumerate(zip(*columns, strict=True)):
            checked = [box and checked_box(box, f"{where}, step {step}") for box in pair]
            if checked[0]:
                boxes[step] = tuple(filter(None, checked))
        return boxes


@dataclass(frozen=True, kw_only=True, eq=False)
class EcotAnnotations:
    """Embodied Chain-of-Thought's features: one JSON of all episodes, over a gigabyte for Bridge::

        {file_path: {episode_id: {"metadata": {...}, "features": {"bboxes": ..., ...},
                                  "reasoning": {"0": {"subtask": ..., "move": ...}, ...}}}}

    The file is scanned once for where each episode lies (its braces are counted, nothing is
    parsed), and only episodes that are asked for are read.

    The motion text is the move and its reason. Of all visible objects' boxes, those named by the
    step's subtask are kept, in the order in which it names them: its object, then its destination.

    Attributes:
      path: the file.
      episodes: first byte and end of each episode, by key: file path, "_", episode's number.
      digest: SHA-256 of the file.
    """

    path: Path
    episodes: Mapping[str, tuple[int, int]]
    digest: str

    @classmethod
    def read(cls, path: Path) -> "EcotAnnotations":
        """Opens a file; see `open_provider`."""
        episodes: dict[str, tuple[int, int]] = {}
        with open(path, "rb") as file, _mapped(file, path) as data:
            for file_path, episode_id, start, end in _scan_ecot(data, path):
                key = f"{file_path}_{episode_id}"
                if key in episodes:
                    raise ValueError(f"{path}: episode {key!r} is there twice")
                episodes[key] = (start, end)
            digest = hashlib.sha256(data).hexdigest()
        return cls(path=path, episodes=episodes, digest=digest)

    @property
    def fingerprint(self) -> str:
        """See `AnnotationProvider`; likewise the next one."""
        return _fingerprint("ecot", self.digest)

    @property
    def description(self) -> str:
        return f"ecot:{self.path}"

    def episode(self, name: EpisodeName) -> Mapping[int, Annotation] | None:
        """Found by its key alone."""
        values, where = self._load(name.key)
        reasoning = values.get("reasoning")
        if not reasoning:
            return None
        features = values.get("features") or {}
        stored_steps = (values.get("metadata") or {}).get("n_steps")
        boxes = features.get("bboxes") or ()
        annotations = {}
        for number, entry in reasoning.items():
            step = checked_step(number, stored_steps, where)
            place = f"{where}, step {step}"
            if not isinstance(entry, dict):
                raise ValueError(f"{place}: should be a JSON object; got {entry!r:.80}")
            subtask = text_of(entry, "subtask", place).strip().rstrip(".")
            visible = boxes[step] if step < len(boxes) else ()
            motion = [_sentence(text_of(entry, part, place)) for part in ("move", "move_reason")]
            annotation = Annotation(
                subtask=subtask,
                boxes=self._named_boxes(subtask, visible, place),
                motion=" ".join(filter(None, motion)),
            )
            if annotation != Annotation():
                annotations[step] = annotation
        return annotations

    def _load(self, key: str) -> tuple[Mapping[str, Any], str]:
        """An episode and its name for messages; empty where there is none."""
        where = f"{self.path}, episode {key!r}"
        if key not in self.episodes:
            return {}, where
        start, end = self.episodes[key]
        with open(self.path, "rb") as file:
            file.seek(start)
            try:
                return json.loads(file.read(end - start)), where
            except ValueError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error

    def _named_boxes(self, subtask: str, visible: Sequence[Any], where: str) -> tuple[Box, ...]:
        """The boxes of the first two objects that a text names, the likeliest of each name."""

        def likeness(entry: Any) -> tuple[int, float]:
            name = entry[1].lower()
            return len(name) if name in subtask.lower() else 0, entry[0]

        words = re.findall(r"\w+", subtask.lower())
        named: dict[int, Any] = {}
        for entry in visible:
            if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[1], str):
                raise ValueError(
                    f"{where}: a box is [probability, name, [x1, y1, x2, y2]]; got {entry}"
                )
            # A name's last word is what the thing is: "the blue spoon" is a spoon.
            noun = (re.findall(r"\w+", entry[1].lower()) or [""])[-1]
            if noun in words:
                place = words.index(noun)
                named[place] = max(entry, named.get(place, entry), key=likeness)
        side = (float(ECOT_IMAGE_PX),) * 2
        return tuple(
            checked_box(named[place][2], where, scale=side, tolerance=ECOT_OVERHANG)
            for place in sorted(named)[:2]
        )


_BRACES_AND_TEXTS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}]', re.DOTALL)


def _scan_ecot(data: mmap.mmap, path: Path) -> Iterator[tuple[str, str, int, int]]:
    """File path, episode's number, first byte and end of every episode.

    Episodes are the objects at depth 3; the texts at depths 1 and 2 are their keys.
    """
    depth, start = 0, 0
    names = {1: "", 2: ""}
    for match in _BRACES_AND_TEXTS.finditer(data):
        token = match.group()
        if token == b"{":
            depth += 1
            if depth == 3:
                start = match.start()
        elif token == b"}":
            if depth == 3:
                yield names[1], names[2], start, match.end()
            depth -= 1
        elif depth in names:
            names[depth] = json.loads(token)
    if depth or not data[:64].lstrip().startswith(b"{"):
        raise ValueError(f"{path}: should be one JSON object; is the file complete?")


def _mapped(file: Any, path: Path) -> mmap.mmap:
    """A file's bytes; an empty one cannot be mapped."""
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty")
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _sentence(text: str) -> str:
    """`"move down"` -> `"Move down."`"""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


def _integer(line: Mapping[str, Any], name: str, where: str) -> int:
    value = line.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{where}: {name!r} should be a number from 0 on; got {value!r}")
    return value


def _fingerprint(kind: str, digest: str) -> str:
    """Of the reader and what it reads."""
    return f"{kind}:{hashlib.sha256(f'2 {kind} {digest}'.encode()).hexdigest()[:32]}"
