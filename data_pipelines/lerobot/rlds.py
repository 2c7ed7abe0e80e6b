"""A LeRobot data set as RLDS episodes: the same numbers, the frames as JPEG images.

    observation.state               steps/observation/state
    action                          steps/action
    observation.images.image_0      steps/observation/image_0     decoded, JPEG of quality 95
    (the task's text)               steps/language_instruction
    (annotations, if any)           steps/reasoning/subtask, boxes, motion
                                    steps/is_first, is_last, is_terminal
                                    episode_metadata/file_path, episode_index, success

`converted_spec` is the definition by which the result is read. Episodes of tasks that the source
leaves out are left out here, too.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines import storage
from data_pipelines.lerobot.layouts import INSTRUCTION
from data_pipelines.lerobot.meta import BOOKKEEPING, Episode, Metadata
from data_pipelines.lerobot.source import TABLES_KEPT, LeRobotSource, key_of
from data_pipelines.lerobot.video import read_frame, scan
from data_pipelines.oxe.spec import DatasetSpec, ReasoningKeys
from data_pipelines.oxe.terms import parse
from data_pipelines.rlds.directory import Feature
from data_pipelines.rlds.writer import encode_episode

BOXES = 2  # of a step at most; those that are missing are rows of NaN
REASONING = ReasoningKeys(
    subtask="reasoning/subtask", boxes="reasoning/boxes", motion="reasoning/motion"
)
_MADE = (
    Feature(key=f"steps/{INSTRUCTION}", kind="text", per_step=True),
    *(
        Feature(key=f"steps/{name}", kind="tensor", dtype="bool", per_step=True)
        for name in ("is_first", "is_last", "is_terminal")
    ),
    Feature(key="episode_metadata/file_path", kind="text"),
    Feature(key="episode_metadata/episode_index", kind="tensor", dtype="int64"),
)
_SUCCESS = Feature(key="episode_metadata/success", kind="tensor", dtype="bool")
_REASONING = (
    Feature(key=f"steps/{REASONING.subtask}", kind="text", per_step=True),
    Feature(
        key=f"steps/{REASONING.boxes}",
        kind="tensor",
        shape=(BOXES, 4),
        dtype="float32",
        per_step=True,
    ),
    Feature(key=f"steps/{REASONING.motion}", kind="text", per_step=True),
)


def rlds_features(source: LeRobotSource) -> tuple[Feature, ...]:
    """What a converted episode consists of.

    Raises:
      ValueError: two columns would get the same key, or a column cannot be stored.
    """
    features = [_feature(source.metadata, key) for key in _columns(source.metadata)]
    made = (
        *_MADE,
        *((_SUCCESS,) if source.spec.success else ()),
        *(_REASONING if source.reasoning else ()),
    )
    keys = [feature.key for feature in (*features, *made)]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{source.source}: several columns would become {', '.join(twice)}")
    return (*features, *made)


def rlds_episodes(source: LeRobotSource, shard: int) -> Iterator[bytes]:
    """The serialised episodes of one shard, of `len(source.shard_episodes)`.

    Raises:
      FileNotFoundError, ValueError: as `LeRobotSource.episodes`; or a frame is damaged.
    """
    features, metadata = rlds_features(source), source.metadata
    columns = [k for k in _columns(metadata) if metadata.features[k].dtype != "video"]
    videos = [k for k in metadata.cameras if metadata.features[k].dtype == "video"]
    table_of = lru_cache(maxsize=TABLES_KEPT)(scan)
    for episode, raw in source.raw(shard, list(dict.fromkeys([*columns, INSTRUCTION]))):
        if raw is None:
            continue
        values: dict[str, Any] = {}
        for key in columns:
            values[_flat(metadata, key)] = _values(metadata, key, raw[key])
        for key in videos:
            table = table_of(storage.join(metadata.root, episode.videos[key].file))
            values[_flat(metadata, key)] = [
                read_frame(table.path, int(table.pts[at]), int(table.keyframe_pts[at]))
                for at in source.frames_of(episode, key, table)
            ]
        if source.spec.success:
            values[_SUCCESS.key] = bool(np.any(raw[source.spec.success]))
        values |= _made(source, episode, raw[INSTRUCTION])
        yield encode_episode(features, values)


def converted_spec(source: LeRobotSource) -> DatasetSpec:
    """The definition of the converted data set: the source's, with the new keys."""

    def renamed(text: str) -> str:
        column = parse(text).feature
        new = _flat(source.metadata, column).removeprefix("steps/") if column else ""
        return text.replace(column, new, 1) if column else text

    spec = source.spec
    return replace(
        spec,
        action=tuple(map(renamed, spec.action)),
        state=tuple(map(renamed, spec.state)),
        cameras={
            camera: _flat(source.metadata, key).removeprefix("steps/")
            for camera, key in spec.cameras.items()
        },
        success=_SUCCESS.key if spec.success else "",
        episode_key=("episode_metadata/file_path",),
        reasoning=REASONING if source.reasoning else None,
    )


def _columns(metadata: Metadata) -> list[str]:
    """The columns that are converted: all but LeRobot's bookkeeping."""
    return [key for key in metadata.features if key not in BOOKKEEPING]


def _flat(metadata: Metadata, key: str) -> str:
    """A column's key in RLDS."""
    name = key.rpartition(".")[2]
    if key in metadata.cameras and key.startswith("observation."):
        return f"steps/observation/{name}"
    return f"steps/{key.replace('.', '/')}"


def _feature(metadata: Metadata, key: str) -> Feature:
    feature, flat = metadata.features[key], _flat(metadata, key)
    if key in metadata.cameras:
        shape = feature.shape
        # Images are declared (H, W, 3) or (3, H, W), frames are (H, W, 3).
        if len(shape) == 3 and shape[0] == 3 and shape[2] != 3:
            shape = (*shape[1:], 3)
        if len(shape) != 3 or shape[2] != 3:
            raise ValueError(
                f"{metadata.root}: camera {key!r} has the shape {feature.shape}; allowed: "
                f"(height, width, 3) and (3, height, width)"
            )
        return Feature(key=flat, kind="image", shape=shape, dtype="uint8", per_step=True)
    if feature.dtype == "string":
        return Feature(key=flat, kind="text", per_step=True)
    return Feature(key=flat, kind="tensor", shape=feature.shape, dtype=feature.dtype, per_step=True)


def _values(metadata: Metadata, key: str, rows: Any) -> Any:
    """A column's rows as the writer takes them."""
    dtype = metadata.features[key].dtype
    if dtype == "image":
        return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in rows]
    return [row.decode() for row in rows] if dtype == "string" else rows


def _made(source: LeRobotSource, episode: Episode, words: Sequence[bytes]) -> Mapping[str, Any]:
    """The features that are not columns."""
    length, step = episode.length, np.arange(episode.length)
    values = {
        f"steps/{INSTRUCTION}": [text.decode() for text in words],
        "steps/is_first": step == 0,
        "steps/is_last": step == length - 1,
        "steps/is_terminal": step == length - 1,
        "episode_metadata/file_path": key_of(episode),
        "episode_metadata/episode_index": episode.number,
    }
    if not source.reasoning:
        return values
    annotations = source.annotated(episode)
    boxes = np.full((length, BOXES, 4), np.nan, np.float32)
    texts: dict[str, list[str]] = {name: [""] * length for name in ("subtask", "motion")}
    for at, annotation in annotations.items():
        if len(annotation.boxes) > BOXES:
            raise ValueError(
                f"{source.source}, episode {episode.number}, step {at}: "
                f"{len(annotation.boxes)} boxes; at most {BOXES} can be stored"
            )
        boxes[at, : len(annotation.boxes)] = np.reshape(annotation.boxes, (-1, 4))
        texts["subtask"][at], texts["motion"][at] = annotation.subtask, annotation.motion
    return values | {
        f"steps/{REASONING.subtask}": texts["subtask"],
        f"steps/{REASONING.boxes}": boxes,
        f"steps/{REASONING.motion}": texts["motion"],
    }
