"""What a LeRobot data set says about itself: one description of its two layouts.

    v2.0, v2.1: a file per episode             v3.0: many episodes in a file
    meta/info.json                             meta/info.json
    meta/episodes.jsonl, tasks.jsonl           meta/tasks.parquet, meta/episodes/chunk-000/...
    data/chunk-000/episode_000000.parquet      data/chunk-000/file-000.parquet
    videos/chunk-000/KEY/episode_000000.mp4    videos/KEY/chunk-000/file-000.mp4, from second s on

The rows of an episode in its data file are those that carry its number in the column
`episode_index`. `meta/modality.json`, which GR00T added, names the columns' entries::

    {"action": {"x": {"start": 0, "end": 1}, ...}, "video": {"image_0": {"original_key": ...}},
     "annotation": {"human.action.task_description": {"original_key": "task_index"}}}

Everything is read through `data_pipelines.storage`: a data set may lie in a bucket.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipelines import storage
from data_pipelines.lerobot import INFO, MissingExtra

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtra(
        "LeRobot data sets need PyArrow: install the extra `lerobot` (lara-jax[lerobot])"
    ) from error

MODALITY = "meta/modality.json"
TASKS_V2, EPISODES_V2 = "meta/tasks.jsonl", "meta/episodes.jsonl"
TASKS_V3 = "meta/tasks.parquet"
EPISODES_V3 = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VERSIONS = ("v2.0", "v2.1", "v3.0")
# Columns that LeRobot itself adds to the recorded ones.
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A column of the data, or a camera.

    Attributes:
      dtype: NumPy's name, or "video", "image" or "string".
      shape: of one step.
      names: of the entries of a vector; empty where the data set gives none.
    """

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "Feature":
        """From the parsed JSON; `where` names it in messages."""
        entry = _object(values, where)
        dtype, shape = entry.get("dtype"), entry.get("shape")
        if not isinstance(dtype, str):
            raise ValueError(f"{where}: 'dtype' should be a text; got {dtype!r}")
        if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape):
            raise ValueError(f"{where}: 'shape' should be a list of sizes; got {shape!r}")
        return cls(dtype=dtype, shape=tuple(shape), names=tuple(_names(entry.get("names"))))


@dataclass(frozen=True, kw_only=True)
class VideoSpan:
    """Where an episode's video lies: the file, and when the episode begins in it."""

    file: str
    from_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode.

    Attributes:
      number: its episode_index.
      length: steps.
      tasks: its instructions, of the data set's.
      data_file: parquet file, relative to the root.
      videos: by video key.
    """

    number: int
    length: int
    tasks: tuple[str, ...]
    data_file: str
    videos: Mapping[str, VideoSpan]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Part of a vector column: entries `start` to `end` of `column`."""

    column: str
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Modality:
    """meta/modality.json: named entries of the vectors, named cameras, the task's column."""

    state: Mapping[str, Entry]
    action: Mapping[str, Entry]
    video: Mapping[str, str]
    task_column: str = "task_index"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "Modality":
        """From the parsed JSON; `where` names the file in messages."""

        def named(part: str) -> Mapping[str, Mapping[str, Any]]:
            found = _object(values.get(part, {}), f"{where}: {part!r}")
            return {name: _object(e, f"{where}: {part}.{name}") for name, e in found.items()}

        def entries(part: str, column: str) -> dict[str, Entry]:
            return {
                name: Entry(
                    column=entry.get("original_key") or column,
                    start=_number(entry, "start", f"{where}: {part}.{name}"),
                    end=_number(entry, "end", f"{where}: {part}.{name}"),
                )
                for name, entry in named(part).items()
            }

        video = {
            name: entry.get("original_key") or f"observation.images.{name}"
            for name, entry in named("video").items()
        }
        tasks = [
            entry.get("original_key") or f"annotation.{name}"
            for name, entry in named("annotation").items()
            if name.endswith("task_description")
        ]
        return cls(
            state=entries("state", "observation.state"),
            action=entries("action", "action"),
            video=video,
            task_column=tasks[0] if tasks else "task_index",
        )


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """A LeRobot data set; `Metadata.read(root)` makes one.

    Attributes:
      root: directory or URL.
      codebase_version: one of VERSIONS.
      fps: steps a second.
      robot: as the data set names it.
      features: by column or camera key.
      tasks: instruction by task_index.
      episodes: by episode_index, ascending.
      splits: [first, end) episode numbers.
      modality: None where there is no modality.json.
      files: below meta/ that all this was read from.
    """

    root: str
    codebase_version: str
    fps: float
    robot: str
    features: Mapping[str, Feature]
    tasks: Mapping[int, str]
    episodes: Mapping[int, Episode]
    splits: Mapping[str, tuple[int, int]]
    modality: Modality | None = None
    files: tuple[str, ...] = ()

    @classmethod
    def read(cls, root: str) -> "Metadata":
        """Reads the files below meta/; opens neither data nor videos.

        Raises:
          FileNotFoundError: `root` is no LeRobot data set, or a file below meta/ is missing.
          ValueError: the version is not one of VERSIONS, or a file is malformed.
        """
        info, where = _json(root, INFO), storage.join(root, INFO)
        version = info.get("codebase_version")
        if version not in VERSIONS:
            raise ValueError(
                f"{where}: codebase_version is {version!r}; allowed: {', '.join(VERSIONS)}"
            )
        features = {
            key: Feature.from_dict(entry, f"{where}: feature {key!r}")
            for key, entry in _object(info.get("features"), f"{where}: 'features'").items()
        }
        videos = [key for key, feature in features.items() if feature.dtype == "video"]
        for name in ("data_path", *(["video_path"] if videos else [])):
            if not isinstance(info.get(name), str):
                raise ValueError(
                    f"{where}: {name!r} should be a pattern of file names; got {info.get(name)!r}"
                )
        fps = info.get("fps")
        if not isinstance(fps, int | float) or not fps > 0:
            raise ValueError(f"{where}: 'fps' should be steps a second, above 0; got {fps!r}")
        read = _read_v3 if version == "v3.0" else _read_v2
        tasks, episodes, lists = read(root, info, videos)
        by_number = {e.number: e for e in sorted(episodes, key=lambda e: e.number)}
        total = info.get("total_episodes", len(episodes))
        if not total == len(episodes) == len(by_number):
            raise ValueError(
                f"{where} counts {total} episodes; the list of episodes has "
                f"{len(episodes)}, {len(by_number)} different ones"
            )
        has_modality = storage.exists(storage.join(root, MODALITY))
        return cls(
            root=root,
            codebase_version=version,
            fps=float(fps),
            robot=info.get("robot_type") or "",
            features=features,
            tasks=tasks,
            episodes=by_number,
            splits=_splits(root, info, max(by_number, default=-1) + 1),
            modality=Modality.from_dict(_json(root, MODALITY), storage.join(root, MODALITY))
            if has_modality
            else None,
            files=(INFO, *lists, *((MODALITY,) if has_modality else ())),
        )

    @property
    def cameras(self) -> tuple[str, ...]:
        """Keys of the features that are videos or images."""
        return tuple(k for k, f in self.features.items() if f.dtype in ("video", "image"))

    def of_split(self, split: str) -> tuple[Episode, ...]:
        """The episodes of a split; "all" is every one."""
        if split == "all":
            return tuple(self.episodes.values())
        if split not in self.splits:
            raise ValueError(
                f"{self.root} has no split {split!r}; it has: {', '.join((*self.splits, 'all'))}"
            )
        first, end = self.splits[split]
        return tuple(e for e in self.episodes.values() if first <= e.number < end)


def read_table(root: str, file: str, columns: Iterable[str] | None = None) -> pa.Table:
    """A parquet file's columns; all of them by default.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no parquet file, or it lacks a column.
    """
    path = storage.join(root, file)
    try:
        with storage.open_read(path) as stream:
            parquet = pq.ParquetFile(stream)
            found = parquet.schema_arrow.names
            wanted = list(found if columns is None else columns)
            missing = [name for name in wanted if name not in found]
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}; it has: {', '.join(found)}"
                )
            return parquet.read(columns=wanted)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root} has no file {file}") from error
    except pa.ArrowException as error:
        raise ValueError(f"{path} is no readable parquet file: {error}") from error


# Tasks, episodes, and the files that list them.
_Lists = tuple[dict[int, str], list[Episode], list[str]]


def _read_v2(root: str, info: Mapping[str, Any], videos: Iterable[str]) -> _Lists:
    """Tasks and episodes where each episode has files of its own."""
    tasks = {
        row["task_index"]: row["task"] for row in _jsonl(root, TASKS_V2, ("task_index", "task"))
    }
    episodes = []
    for row in _jsonl(root, EPISODES_V2, ("episode_index", "length", "tasks")):
        number = row["episode_index"]
        place = {
            "episode_index": number,
            "episode_chunk": number // info.get("chunks_size", 1000),
        }
        episodes.append(
            Episode(
                number=number,
                length=row["length"],
                tasks=tuple(row["tasks"]),
                data_file=info["data_path"].format(**place),
                videos={
                    key: VideoSpan(file=info["video_path"].format(video_key=key, **place))
                    for key in videos
                },
            )
        )
    return tasks, episodes, [TASKS_V2, EPISODES_V2]


def _read_v3(root: str, info: Mapping[str, Any], videos: Iterable[str]) -> _Lists:
    """Tasks and episodes where a file holds many episodes."""
    table = read_table(root, TASKS_V3)
    # Pandas wrote the texts as the table's index, with or without a name.
    text = next((c for c in ("task", "__index_level_0__") if c in table.column_names), None)
    if text is None or "task_index" not in table.column_names:
        raise ValueError(
            f"{storage.join(root, TASKS_V3)} needs the columns task_index and task; "
            f"it has: {', '.join(table.column_names)}"
        )
    tasks = dict(
        zip(table.column("task_index").to_pylist(), table.column(text).to_pylist(), strict=True)
    )
    columns = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    for key in videos:
        columns += [f"videos/{key}/{c}" for c in ("chunk_index", "file_index", "from_timestamp")]
    files = list(_numbered(root, EPISODES_V3))
    if not files:
        raise FileNotFoundError(
            f"{root} has no file {EPISODES_V3.format(chunk_index=0, file_index=0)}"
        )
    rows = [row for file in files for row in read_table(root, file, columns).to_pylist()]

    def place(row: Mapping[str, Any], part: str) -> dict[str, int]:
        return {key: row[f"{part}/{key}"] for key in ("chunk_index", "file_index")}

    episodes = [
        Episode(
            number=row["episode_index"],
            length=row["length"],
            tasks=tuple(row["tasks"]),
            data_file=info["data_path"].format(**place(row, "data")),
            videos={
                key: VideoSpan(
                    file=info["video_path"].format(video_key=key, **place(row, f"videos/{key}")),
                    from_seconds=row[f"videos/{key}/from_timestamp"],
                )
                for key in videos
            },
        )
        for row in rows
    ]
    return tasks, episodes, [TASKS_V3, *files]


def _splits(root: str, info: Mapping[str, Any], end: int) -> dict[str, tuple[int, int]]:
    """[first, end) of "first:end"; without splits, "train" is everything."""
    splits = {}
    named = _object(info.get("splits") or {}, f"{storage.join(root, INFO)}: 'splits'")
    for name, text in named.items():
        first, _, last = str(text).partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(
                f"{storage.join(root, INFO)}: split {name!r} is {text!r}; allowed: first:end"
            )
        splits[name] = (int(first), int(last))
    return splits or {"train": (0, end)}


def _names(names: Any) -> list[str]:
    """Names of a vector's entries, given as a list, as {"motors": list}, or not at all."""
    if isinstance(names, Mapping):
        names = next(iter(names.values()), None)
    return [str(name) for name in names] if isinstance(names, list) else []


def _text(root: str, file: str) -> str:
    """A file of the data set as text."""
    try:
        return storage.read_text(storage.join(root, file))
    except FileNotFoundError as error:
        if file == INFO:
            raise FileNotFoundError(f"{root} is no LeRobot data set: it has no {INFO}") from error
        raise FileNotFoundError(f"{root} has no file {file}") from error


def _numbered(root: str, pattern: str) -> Iterator[str]:
    """The files that there are of a pattern of chunks and files, each counted from 0 on."""
    for chunk in itertools.count():
        for number in itertools.count():
            file = pattern.format(chunk_index=chunk, file_index=number)
            if storage.exists(storage.join(root, file)):
                yield file
            elif number:
                break
            else:
                return


def _object(values: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} should be a JSON object; got {values!r:.80}")
    return values


def _number(entry: Mapping[str, Any], name: str, where: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int):
        raise ValueError(f"{where}: {name!r} should be a number; got {value!r}")
    return value


def _json(root: str, file: str) -> Mapping[str, Any]:
    try:
        values = json.loads(_text(root, file))
    except ValueError as error:
        raise ValueError(f"{storage.join(root, file)} is no JSON: {error}") from error
    return _object(values, storage.join(root, file))


def _jsonl(root: str, file: str, fields: Iterable[str]) -> list[Any]:
    """One JSON object a line, each with these fields."""
    rows = []
    for number, line in enumerate(_text(root, file).split("\n"), start=1):
        where = f"{storage.join(root, file)}, line {number},"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from error
        if line.strip():
            missing = [name for name in fields if name not in _object(row, where)]
            if missing:
                raise ValueError(f"{where} has no field {', '.join(missing)}")
            rows.append(row)
    return rows
