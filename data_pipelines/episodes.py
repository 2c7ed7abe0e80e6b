"""Episodes in memory, images on disk: a table of what is small, and any step of it as a sample.

At the start every record is parsed once and its numbers and texts are kept (about 70 bytes a step
and the words); images stay in the TFRecord files. A sample then costs one read of its episode's
record and two JPEG decodes a view::

    table = load_episodes(path, "train")
    StepSource(table, action_horizon=4)[i]      -> images, state, action chunk, words of step i

    episode, 5 steps kept:   a0 a1 a2 a3 a4 |
    chunk at step 3, C = 4:            a3 a4 h h      action_mask  T T F F

Past the end the chunk holds still, h: no motion, and the last gripper position kept. A step that
`standardize` dropped is no sample, but its frame still is the next frame of the step before it.
"""

import io
import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines.datasets import DatasetSpec, ReasoningKeys, spec_named, standardize
from data_pipelines.rlds.directory import Directory, Example
from data_pipelines.rlds.tfrecord import TFRecordFile
from lara_jax.tokenizers.prompt import Annotation


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One episode without its images: N steps remain of the T that are stored.

    Attributes:
      shard, record: where it lies.
      steps: int64[N], the stored step of each row.
      raw_steps: T.
      actions: float32[N, A] in metres, radians and 0..1.   states: float32[N, J] likewise.
      instructions: N strings, empty where a step has none.
      annotations: N annotations, None where a step has none.
    """

    shard: TFRecordFile
    record: int
    steps: np.ndarray
    raw_steps: int
    actions: np.ndarray
    states: np.ndarray
    instructions: tuple[str, ...]
    annotations: tuple[Annotation | None, ...]

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeTable:
    """All episodes of a split. `load_episodes` makes one.

    Attributes:
      spec: the dataset.
      directory: its TFDS directory.
      split: the split's name.
      views: names of the cameras in use; the first is the primary one.
      image_size: (height, width) of every frame, px.
      episodes: in the order of the files.
      bounds: int64[E + 1], the running index of each episode's first step, and the number of steps.
    """

    spec: DatasetSpec
    directory: Directory
    split: str
    views: tuple[str, ...]
    image_size: tuple[int, int]
    episodes: tuple[Episode, ...]
    bounds: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        lengths = [len(episode) for episode in self.episodes]
        object.__setattr__(self, "bounds", np.cumsum([0, *lengths]))

    @property
    def steps(self) -> int:
        """Number of steps that are samples."""
        return int(self.bounds[-1])

    @property
    def dropped_steps(self) -> int:
        """Number of stored steps that are no samples."""
        return sum(episode.raw_steps - len(episode) for episode in self.episodes)

    def locate(self, index: int) -> tuple[Episode, int]:
        """The episode of a running step index, and the row in it."""
        if not 0 <= index < self.steps:
            raise IndexError(f"step {index} of {self.steps}")
        number = int(np.searchsorted(self.bounds, index, side="right")) - 1
        return self.episodes[number], index - int(self.bounds[number])

    def where(self, index: int) -> str:
        """Names a step in messages: "/data/x.tfrecord-00000-of-00001, record 3, step 7"."""
        episode, row = self.locate(index)
        return f"{episode.shard.where(episode.record)}, step {episode.steps[row]}"


class StepSource:
    """The steps of a table by running index, as grain's random-access data source.

    An item is a dict: `images`, `next_images` uint8[V, H, W, 3]; `view_mask`, `next_mask` bool[V];
    `state` float32[J], `actions` float32[C, A] in the data's units; `action_mask` bool[C];
    `instruction` str; `annotation` Annotation or None; `sample_id` int, the running index.
    """

    def __init__(self, table: EpisodeTable, *, action_horizon: int) -> None:
        """Makes the source.

        Args:
          table: the episodes.
          action_horizon: C, the number of actions in a chunk.
        """
        if action_horizon < 1:
            raise ValueError(f"action_horizon is {action_horizon}; it must be at least 1")
        self.table = table
        self.action_horizon = action_horizon

    def __len__(self) -> int:
        return self.table.steps

    def __repr__(self) -> str:
        table = self.table
        return (
            f"StepSource({table.directory.path}, {table.split!r}, views={table.views}, "
            f"action_horizon={self.action_horizon}, steps={len(self)})"
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = operator.index(index)
        episode, row = self.table.locate(index)
        actions, action_mask = action_chunk(
            episode.actions, row, self.action_horizon, np.array(self.table.spec.absolute_action)
        )
        images, next_images = self._frames(episode, int(episode.steps[row]))
        return {
            "images": images,
            "view_mask": np.ones(len(images), bool),
            "next_images": next_images,
            # A still scene teaches nothing about what comes next, and at the end nothing does.
            "next_mask": np.any(images != next_images, axis=(1, 2, 3)),
            "state": episode.states[row],
            "actions": actions,
            "action_mask": action_mask,
            "instruction": episode.instructions[row],
            "annotation": episode.annotations[row],
            "sample_id": index,
        }

    def _frames(self, episode: Episode, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The frames of a stored step and of the next one (itself at the end).

        Returns:
          uint8[V, H, W, 3], twice.
        """
        table = self.table
        example = table.directory.parse(episode.shard, episode.record)
        later = min(step + 1, episode.raw_steps - 1)
        images, next_images = [], []
        for view, key in zip(table.views, table.spec.camera_keys(table.views), strict=True):
            frames = example.encoded(key)
            image = decode_image(frames[step], _frame(example, step, view))
            same = frames[later] == frames[step]
            images.append(image)
            next_images.append(
                image if same else decode_image(frames[later], _frame(example, later, view))
            )
        return np.stack(images), np.stack(next_images)


def load_episodes(
    path: str | os.PathLike[str], split: str, *, views: Sequence[str] = ()
) -> EpisodeTable:
    """Reads the low-dimensional data of a split and checks the frames' sizes, decoding no image.

    Args:
      path: a TFDS version directory.
      split: such as "train".
      views: names of the cameras to use, primary first; empty for the dataset's own default.

    Raises:
      FileNotFoundError: no such directory, or a file of it is missing.
      ValueError: unknown dataset, split or view; a corrupt or truncated file; a missing or
        ill-shaped feature; frames of different sizes; no step at all. The message names file,
        record and feature.
    """
    directory = Directory.read(path)
    spec = spec_named(directory.name)
    views = tuple(views) or spec.default_views
    keys = (spec.action_key, spec.state_key, spec.language_key, *spec.camera_keys(views))
    for key in keys:
        directory.feature(key)
    reasoning = _reasoning_keys(spec, directory)
    image_size: tuple[int, int] | None = None
    episodes = []
    for shard in directory.open_split(split):
        for record in range(len(shard)):
            example = directory.parse(shard, record)
            episode = _episode(spec, reasoning, example, shard, record)
            episodes.append(episode)
            for size, where in _frame_sizes(spec, views, example, episode.raw_steps):
                image_size = image_size or size
                if size != image_size:
                    raise ValueError(
                        f"{where}: the frame is {size[0]}x{size[1]} px (height x width), those "
                        f"before it {image_size[0]}x{image_size[1]}; all frames in use must have "
                        f"one size"
                    )
    if image_size is None or not any(len(episode) for episode in episodes):
        stored = sum(episode.raw_steps for episode in episodes)
        raise ValueError(
            f"{directory.path}, split {split!r}: no step to learn from "
            f"({len(episodes)} episodes, {stored} stored steps)"
        )
    return EpisodeTable(
        spec=spec,
        directory=directory,
        split=split,
        views=views,
        image_size=image_size,
        episodes=tuple(episodes),
    )


def action_chunk(
    actions: np.ndarray, row: int, horizon: int, absolute: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The actions from `row` on, holding still past the episode's end.

    Args:
      actions: float32[N, A], an episode's actions in the data's units.
      row: the first action, in [0, N).
      horizon: C.
      absolute: bool[A], True for dimensions that hold their last value; the others become 0.

    Returns:
      float32[C, A] and bool[C], True inside the episode.
    """
    rows = np.arange(row, row + horizon)
    mask = rows < len(actions)
    chunk = actions[np.minimum(rows, len(actions) - 1)]
    return np.where(mask[:, None] | absolute, chunk, np.float32(0)), mask


def decode_image(data: bytes, where: str) -> np.ndarray:
    """An encoded frame as uint8[H, W, 3], RGB.

    JPEGs are decoded with the fast integer DCT: to the bit what TensorFlow's decoder gives, and so
    what policies trained through tf.data have seen. Other formats go through Pillow.

    Args:
      data: a JPEG, PNG or whatever else Pillow reads.
      where: names the frame in messages.
    """
    try:
        if _is_jpeg(data):
            return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=False)
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (ValueError, OSError, SyntaxError) as error:  # Pillow: a broken PNG
        raise ValueError(f"{where}: the frame cannot be decoded ({error})") from error


def encoded_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) in px of an encoded frame, from its header alone."""
    try:
        if _is_jpeg(data):
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return height, width
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except (ValueError, OSError, SyntaxError) as error:  # Pillow: a broken PNG
        raise ValueError(f"{where}: not an encoded image ({error})") from error


def _is_jpeg(data: bytes) -> bool:
    """True if the data starts as a JPEG does, a truncated one too: decoding it then says so."""
    return data[:2] == b"\xff\xd8"


def _episode(
    spec: DatasetSpec,
    reasoning: ReasoningKeys | None,
    example: Example,
    shard: TFRecordFile,
    record: int,
) -> Episode:
    """Everything of one record but its images."""
    raw_actions = _vectors(example, spec.action_key, spec.raw_action_dim)
    raw_states = _vectors(example, spec.state_key, spec.raw_state_dim)
    raw_steps = len(raw_actions)
    texts = example.text(spec.language_key)
    for key, length in ((spec.state_key, len(raw_states)), (spec.language_key, len(texts))):
        _check_steps(example, key, length, raw_steps)
    actions, states, steps = standardize(spec, raw_actions, raw_states)
    annotations: list[Annotation | None] = [None] * raw_steps
    if reasoning is not None:
        annotations = _annotations(reasoning, example, raw_steps)
    return Episode(
        shard=shard,
        record=record,
        steps=steps,
        raw_steps=raw_steps,
        actions=actions,
        states=states,
        instructions=tuple(texts[step] for step in steps),
        annotations=tuple(annotations[step] for step in steps),
    )


def _vectors(example: Example, key: str, width: int) -> np.ndarray:
    """A step feature of vectors, float32[T, width], checked to be finite."""
    values = example.array(key)
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(
            f"{example.where}: feature {key!r} has shape {values.shape[1:]} a step, "
            f"expected ({width},)"
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        raise ValueError(f"{example.where}, step {bad[0]}: feature {key!r} is not finite")
    return values.astype(np.float32)


def _check_steps(example: Example, key: str, length: int, steps: int) -> None:
    """Refuses a feature that has not one value for each step."""
    if length != steps:
        raise ValueError(
            f"{example.where}: feature {key!r} has {length} steps, the actions {steps}"
        )


def _reasoning_keys(spec: DatasetSpec, directory: Directory) -> ReasoningKeys | None:
    """The annotation features if the directory has them: all of them, or none."""
    keys = spec.reasoning
    if keys is None:
        return None
    names = (keys.subtask, keys.boxes, keys.motion)
    if not any(name in directory.features for name in names):
        return None
    for name in names:
        directory.feature(name)
    return keys


def _annotations(keys: ReasoningKeys, example: Example, steps: int) -> list[Annotation | None]:
    """One annotation a stored step, None where a step has neither text nor box."""
    subtasks, motions = example.text(keys.subtask), example.text(keys.motion)
    boxes = example.array(keys.boxes)
    for key, values in ((keys.subtask, subtasks), (keys.motion, motions), (keys.boxes, boxes)):
        _check_steps(example, key, len(values), steps)
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise ValueError(
            f"{example.where}: feature {keys.boxes!r} has shape {boxes.shape[1:]} a step, "
            f"expected (n, 4)"
        )
    if np.isinf(boxes).any():
        raise ValueError(f"{example.where}: feature {keys.boxes!r} holds an infinite number")
    found: list[Annotation | None] = []
    for subtask, motion, rows in zip(subtasks, motions, boxes, strict=True):
        seen = tuple(tuple(row.tolist()) for row in rows if not np.isnan(row).any())
        empty = not (subtask or motion or seen)
        found.append(None if empty else Annotation(subtask=subtask, boxes=seen, motion=motion))
    return found


def _frame_sizes(
    spec: DatasetSpec, views: tuple[str, ...], example: Example, steps: int
) -> Iterator[tuple[tuple[int, int], str]]:
    """The size of every frame of a record in the views in use, with a name for each frame."""
    for view, key in zip(views, spec.camera_keys(views), strict=True):
        frames = example.encoded(key)
        _check_steps(example, key, len(frames), steps)
        for step, frame in enumerate(frames):
            where = _frame(example, step, view)
            yield encoded_size(frame, where), where


def _frame(example: Example, step: int, view: str) -> str:
    """Names a frame in messages."""
    return f"{example.where}, step {step}, view {view!r}"
