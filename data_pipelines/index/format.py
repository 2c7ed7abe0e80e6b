"""The index of a split on disk: what a dataset's steps are and where their frames lie.

A folder of flat arrays, memory-mapped, beside one JSON header. Nothing is read before it is asked
for, so that memory does not grow with the dataset::

    index.json        Header: dataset, spec, files with sizes, counts, the arrays' shapes and sums
    episodes.bin      EPISODE[E]   rows and frames of each episode, its record, its key
    rows.bin          ROW[N]       standardised steps: which frame, which words, which flags
    actions.bin       float32[N, A]      states.bin  float32[N, J]
    frames.<cam>.bin  ENCODED[F] or VIDEO[F] or RECORD[F], stored steps: where the frame lies
    texts.bin, texts.ends.bin            the distinct strings, UTF-8, one after the other
    annotations.bin, boxes.bin, ...      reasoning of the rows, where there is any

An episode has T stored steps ("frames") and N <= T rows: `standardize` may drop steps, whose frames
still serve as the next frame of the row before.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data_pipelines.oxe.spec import DatasetSpec
from lara_jax.tokenizers.prompt import Annotation

SCHEMA_VERSION = 2
HEADER_FILE = "index.json"

EPISODE = np.dtype(
    [
        ("first_row", "<i8"),
        ("rows", "<i4"),
        ("first_frame", "<i8"),
        ("frames", "<i4"),
        ("file", "<i4"),  # in Header.files
        ("record", "<i8"),  # number of the record in its file (LeRobot: the episode's index)
        ("number", "<i8"),  # among all episodes of the split, those without rows counted, too
        ("key", "<i4"),  # text
        ("success", "i1"),  # 1 yes, 0 no, -1 unknown
    ]
)
ROW = np.dtype(
    [
        ("episode", "<i4"),
        ("frame", "<i4"),  # stored step within the episode
        ("next_frame", "<i4"),  # likewise; equal to `frame` at the very end
        ("instruction", "<i4"),  # text
        ("flags", "u1"),
    ]
)
# Where a frame lies. `crc` is the CRC-32C of the encoded bytes.
ENCODED = np.dtype([("file", "<i4"), ("offset", "<i8"), ("length", "<i4"), ("crc", "<u4")])
VIDEO = np.dtype([("file", "<i4"), ("pts", "<i8"), ("keyframe_pts", "<i8")])
RECORD = np.dtype([("file", "<i4"), ("record", "<i8")])
KINDS: Mapping[str, np.dtype] = {"encoded": ENCODED, "video": VIDEO, "record": RECORD}
ANNOTATION = np.dtype(
    [("subtask", "<i4"), ("motion", "<i4"), ("first_box", "<i8"), ("boxes", "u1")]
)
# Reasons to leave a row out: bits of ROW.flags, by the filter's name.
FLAGS: Mapping[str, int] = {
    "pause": 1,
    "no_language": 2,
    "no_annotation": 4,
    "failed": 8,
    "bad_frame": 16,
}


@dataclass(frozen=True, kw_only=True)
class Camera:
    """How a camera's frames are stored: `kind` as in KINDS; the size of its first frame, px."""

    kind: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file that the index points into.

    Attributes:
      path: relative to the source.
      size: bytes.
      stamp: as of `storage.FileFacts`: a file with another one is worth a look at its checksum.
      checksum: CRC-32C over the CRCs that the file's own records carry, or over the whole file, as
        hexadecimal; empty where nobody made one.
    """

    path: str
    size: int
    stamp: str = ""
    checksum: str = ""


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """Shape, dtype and CRC-32C of one array file."""

    shape: tuple[int, ...]
    dtype: Any
    crc: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """index.json.

    Attributes:
      dataset: the name of its definition, under which all reports and statistics stand.
      version, split: of the source.
      source: its directory or URL when the index was made; frames are read from there unless
        `Index.open` is given another place.
      spec: the dataset's definition.
      cameras: by name.
      files: what EPISODE.file and the frames' `file` count.
      counts: "episodes", "rows", "stored_steps", "dropped_steps" (stored steps that are no rows),
        "empty_episodes", "left_out_episodes" (which the dataset's definition leaves out), and the
        rows that carry each flag as "flag:<name>".
      annotations: what the reasoning came from, empty where there is none. Where it was attached:
        "from", the files as `open_provider` takes them, and the "episodes" and "rows" that have
        some.
      arrays: by file name.
      decoded: True if every frame was decoded when the index was made.
      data_name: what the data call themselves; empty for `dataset`.
      schema_version: of this format.
    """

    dataset: str
    version: str
    split: str
    source: str
    spec: DatasetSpec
    cameras: Mapping[str, Camera]
    files: tuple[SourceFile, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    annotations: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, ArrayInfo] = field(default_factory=dict)
    decoded: bool = False
    data_name: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def own_name(self) -> str:
        """What the data call themselves, whatever definition they are read by."""
        return self.data_name or self.dataset

    @property
    def digest(self) -> str:
        """Identifies the content: SHA-256 of all but places, times, names and prose."""
        facts = self.to_dict() | {"spec": self.spec.fingerprint}
        for name in ("dataset", "data_name", "source", "decoded"):
            del facts[name]
        for file in facts["files"]:
            del file["stamp"]
        facts["annotations"].pop("from", None)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return {**asdict(self), "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Header":
        """The inverse of `to_dict`."""

        def array(info: Mapping[str, Any]) -> ArrayInfo:
            dtype = info["dtype"]
            parsed = dtype if isinstance(dtype, str) else [tuple(entry) for entry in dtype]
            return ArrayInfo(shape=tuple(info["shape"]), dtype=parsed, crc=info["crc"])

        return cls(
            **{
                **values,
                "spec": DatasetSpec.from_dict(values["spec"]),
                "cameras": {k: Camera(**v) for k, v in values["cameras"].items()},
                "files": tuple(SourceFile(**file) for file in values["files"]),
                "arrays": {k: array(v) for k, v in values["arrays"].items()},
            }
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeEntry:
    """One episode on its way into an index: N rows of T stored steps.

    Attributes:
      key: identifies it in annotation files; may be empty.
      file, record: where it lies.
      success: None where unknown.
      actions: float32[N, A].      states: float32[N, J].
      frame, next_frame: int32[N], stored steps.
      instructions: N strings, empty where a step has none.
      annotations: N annotations, None where a step has none; or () for none at all.
      flags: uint8[N], bits of FLAGS.
      frames: by camera, a structured array of KINDS with T entries.
      left_out: the dataset's definition does not want it; it then has no rows.
    """

    key: str
    file: int
    record: int
    success: bool | None
    actions: np.ndarray
    states: np.ndarray
    frame: np.ndarray
    next_frame: np.ndarray
    instructions: Sequence[str]
    annotations: Sequence[Annotation | None]
    flags: np.ndarray
    frames: Mapping[str, np.ndarray]
    stored_steps: int
    left_out: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """An index, opened. `Index.open` makes one; it pickles as its folder's name.

    Attributes:
      folder: where it lies.
      header: what index.json says.
      source: the directory or URL that holds the files.
      read_as: the definition in `header`, where it is not the one that index.json has.
    """

    folder: Path
    header: Header
    source: str
    read_as: DatasetSpec | None = None

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        source: str | None = None,
        spec: DatasetSpec | None = None,
    ) -> "Index":
        """Opens an index; the arrays are mapped when they are first used.

        Args:
          folder: of one split.
          source: where the files lie now; None for where they were.
          spec: a definition of the same fingerprint to read it under; None for its own.

        Raises:
          FileNotFoundError: there is no index.
          ValueError: the index has another schema version, is incomplete or damaged.
        """
        folder = Path(folder)
        file = folder / HEADER_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is no index: it has no {HEADER_FILE}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error})") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{file}: schema version {version!r}; this release reads {SCHEMA_VERSION}"
            )
        try:
            header = Header.from_dict(values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of another shape
            raise ValueError(f"{file} is damaged ({type(error).__name__}: {error})") from error
        read_as = None if spec == header.spec else spec
        if read_as is not None:
            header = replace(header, dataset=read_as.name, data_name=header.own_name, spec=read_as)
        for name, info in header.arrays.items():
            size = int(np.prod(info.shape, dtype=np.int64)) * np.dtype(info.dtype).itemsize
            found = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if found != size:
                raise ValueError(
                    f"{folder / name}: {found} bytes, the index says {size}: it is incomplete"
                )
        return cls(folder=folder, header=header, source=source or header.source, read_as=read_as)

    def __reduce__(self) -> Any:
        return _reopen, (self.folder, self.source, self.read_as)

    def __len__(self) -> int:
        return self.header.counts["rows"]

    @property
    def spec(self) -> DatasetSpec:
        """The dataset."""
        return self.header.spec

    def array(self, name: str) -> np.ndarray:
        """An array by its file's name, memory-mapped, read only."""
        info = self.header.arrays[name]
        if 0 in info.shape:
            return np.zeros(info.shape, info.dtype)
        mapped = np.memmap(self.folder / name, dtype=info.dtype, mode="r", shape=info.shape)
        return mapped.view(np.ndarray)  # which is quicker to index

    @cached_property
    def episodes(self) -> np.ndarray:
        """EPISODE[E]."""
        return self.array("episodes.bin")

    @cached_property
    def rows(self) -> np.ndarray:
        """ROW[N]."""
        return self.array("rows.bin")

    @cached_property
    def actions(self) -> np.ndarray:
        """float32[N, A], in the data's units."""
        return self.array("actions.bin")

    @cached_property
    def states(self) -> np.ndarray:
        """float32[N, J], in the data's units."""
        return self.array("states.bin")

    @cached_property
    def frames(self) -> Mapping[str, np.ndarray]:
        """By camera, where each stored frame lies: ENCODED[F], VIDEO[F] or RECORD[F]."""
        return {camera: self.array(frames_file(camera)) for camera in self.header.cameras}

    def check(self) -> None:
        """Reads all arrays; a ValueError names the first whose bytes are not those written."""
        for name, info in self.header.arrays.items():
            checksum = google_crc32c.Checksum()
            with open(self.folder / name, "rb") as file:
                while block := file.read(2**24):
                    checksum.update(block)
            if int.from_bytes(checksum.digest(), "big") != info.crc:
                raise ValueError(f"{self.folder / name} is damaged, its CRC is another one")

    @property
    def filter_counts(self) -> Mapping[str, int]:
        """How many rows carry each of FLAGS."""
        return {name: self.header.counts[f"flag:{name}"] for name in FLAGS}

    def episode_of(self, row: int) -> np.void:
        """The EPISODE of a row."""
        return self.episodes[int(self.rows[row]["episode"])]

    def instruction(self, row: int) -> str:
        """The instruction of a row, empty where it has none."""
        return self.texts[int(self.rows[row]["instruction"])]

    def key(self, episode: int) -> str:
        """What identifies an episode in annotation files."""
        return self.texts[int(self.episodes[episode]["key"])]

    def annotation(self, row: int) -> Annotation | None:
        """The reasoning of a row, None where it has none."""
        if "annotations.bin" not in self.header.arrays:
            return None
        subtask_text, motion_text, first, count = self._annotations[row].item()
        subtask = self.annotation_texts[subtask_text]
        motion = self.annotation_texts[motion_text]
        if not (subtask or motion or count):
            return None
        boxes = tuple(tuple(box) for box in self._boxes[first : first + count].tolist())
        return Annotation(subtask=subtask, boxes=boxes, motion=motion)

    def where(self, row: int) -> str:
        """Names a row in messages: "/data/x.tfrecord-00000-of-00001, record 3, step 7"."""
        episode = self.episode_of(row)
        path = self.header.files[int(episode["file"])].path
        record, step = int(episode["record"]), int(self.rows[row]["frame"])
        return f"{self.source}/{path}, record {record}, step {step}"

    @cached_property
    def texts(self) -> "Texts":
        """Instructions and keys, by number."""
        return Texts(self.array("texts.bin"), self.array("texts.ends.bin"))

    @cached_property
    def _annotations(self) -> np.ndarray:
        return self.array("annotations.bin")

    @cached_property
    def annotation_texts(self) -> "Texts":
        """Subtasks and motions, by number."""
        return Texts(self.array("annotation_texts.bin"), self.array("annotation_texts.ends.bin"))

    @cached_property
    def _boxes(self) -> np.ndarray:
        return self.array("boxes.bin")


def _reopen(folder: Path, source: str, spec: DatasetSpec | None) -> Index:
    return Index.open(folder, source=source, spec=spec)


def frames_file(camera: str) -> str:
    """The array file of a camera's frames."""
    return f"frames.{camera}.bin"


@dataclass(frozen=True)
class Texts:
    """Distinct strings by number, out of one run of bytes."""

    data: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return self.data[start : int(self.ends[number])].tobytes().decode("utf-8")
