"""Any step of a dataset as a sample, by number, straight from its index.

Nothing is read before a sample is asked for, and then only what it consists of: a few entries of
the index's mapped arrays and two encoded frames a view. An episode and a sample of it, with views
("primary", "primary@-2") and a chunk of C = 3 actions::

    row        0   1   2   3   4  |  end of the episode
                   ^       ^   ^
    sample of      |     image next image         actions     a3 a4 h
    row 3      two steps earlier                  action_mask T  T  F

Past the end the chunk holds still, h: no motion, and the last value of absolute dimensions, such as
the gripper. A view that the dataset lacks, and one from before the episode, is black and masked.

Datasets run at different rates. With `chunk_hz`, an action of the chunk stands for `stride` steps
of a dataset, where stride = control_hz / chunk_hz, rounded, and at least 1::

    stride 2, row 3 of 8    (a3 a4) (a5 a6) (a7 h)    relative dimensions: the sum
                                                      absolute ones: the last

The sum is exact for translations; for rotations it is right to first order, as small angles add.
"""

import hashlib
import json
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from data_pipelines.frames import FrameReader
from data_pipelines.index.format import FLAGS, Index
from data_pipelines.memory import Memory

_BLOCK = 256  # rows that are searched for one that the filters keep
_SCAN = 4096 * _BLOCK  # rows whose flags are looked at in one go
_VIEW = re.compile(r"([^@]+)(@-(\d+))?")
_SPLIT = re.compile(r"(\w+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


@dataclass(frozen=True, kw_only=True, eq=False)
class StepSource:
    """The steps of an index by number, as grain's random-access data source.

    An item is a dict: `images`, `next_images` uint8[V, H, W, 3]; `view_mask`, `next_mask` bool[V];
    `state` float32[J], `actions` float32[C, A] in the data's units; `action_mask` bool[C, A];
    `instruction` str; `annotation` Annotation or None; `sample_id` int, the row in the index.

    Attributes:
      index: of the dataset's split.
      views: cameras by role ("primary") or by name ("image_0"), each perhaps some steps earlier
        ("primary@-2"; with a stride, actions of the chunk earlier).
      action_horizon: C, number of actions in a chunk.
      filters: names of FLAGS; rows that carry one of them are left out as samples.
      episodes: which ones to take, a contiguous part; see `parse_split`.
      image_size: (height, width) in px that all frames are brought to; None for the cameras' own,
        which must then be one.
      chunk_hz: actions a second in a chunk; 0 for the dataset's own rate.
      action_dim: A; a dataset's narrower actions are filled up on the right and masked there. 0 for
        the dataset's own.
      next_frames: whether to read them; without, all are masked, and half the decoding is saved.
    """

    index: Index
    views: tuple[str, ...]
    action_horizon: int
    filters: tuple[str, ...] = ()
    episodes: slice = field(default_factory=lambda: slice(None))
    image_size: tuple[int, int] | None = None
    chunk_hz: float = 0.0
    action_dim: int = 0
    next_frames: bool = True

    def __post_init__(self) -> None:
        name, spec = self.name, self.index.spec
        if self.action_horizon < 1:
            raise ValueError(f"action_horizon is {self.action_horizon}; it must be at least 1")
        unknown = sorted(set(self.filters) - set(FLAGS))
        if unknown:
            raise ValueError(f"unknown filters {unknown}; known: {', '.join(FLAGS)}")
        if self.episodes.step not in (None, 1):
            raise ValueError(f"episodes {self.episodes}: only a contiguous part can be taken")
        if not (math.isfinite(self.chunk_hz) and self.chunk_hz >= 0):
            raise ValueError(f"chunk_hz is {self.chunk_hz}; it must be positive, or 0")
        if self.chunk_hz and spec.control_hz <= 0:
            raise ValueError(
                f"dataset {name!r}: its control_hz is {spec.control_hz}, so that chunk_hz "
                f"{self.chunk_hz:g} cannot be kept"
            )
        if self.action_dim and spec.action_dim > self.action_dim:
            raise ValueError(
                f"dataset {name!r}: its actions ({spec.action_encoding}) are {spec.action_dim} "
                f"wide, action_dim is {self.action_dim}"
            )
        if all(camera is None for camera, _ in self._cameras):
            raise ValueError(
                f"dataset {name!r} has none of the views {', '.join(self.views) or '(none given)'};"
                f" its cameras: {', '.join(self.index.header.cameras)}; "
                f"roles: {', '.join(self._roles) or 'none'}"
            )
        if self.image_size is None and len(set(self._sizes.values())) > 1:
            sizes = ", ".join(f"{camera} {h}x{w}" for camera, (h, w) in self._sizes.items())
            raise ValueError(
                f"dataset {name!r}: views of different sizes ({sizes} px, height x width); "
                f"give an image_size to bring them to"
            )

    @property
    def name(self) -> str:
        """The dataset's."""
        return self.index.header.dataset

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) of every frame, px."""
        return self.image_size or next(iter(self._sizes.values()))

    @cached_property
    def width(self) -> int:
        """A, the width of an action with its filling."""
        return self.action_dim or self.index.spec.action_dim

    @cached_property
    def absolute(self) -> np.ndarray:
        """bool[A] of the dataset's own A, True for dimensions that are positions to hold."""
        return np.array(self.index.spec.absolute_action)

    @property
    def missing_views(self) -> tuple[str, ...]:
        """The views that the dataset lacks altogether."""
        pairs = zip(self.views, self._cameras, strict=True)
        return tuple(view for view, (camera, _) in pairs if camera is None)

    @cached_property
    def stride(self) -> int:
        """Steps of the dataset in an action of the chunk."""
        rate = self.index.spec.control_hz
        return max(1, math.floor(rate / self.chunk_hz + 0.5)) if self.chunk_hz else 1

    @property
    def chunk_rate_hz(self) -> float:
        """Actions a second that a chunk really has: near `chunk_hz`, or the dataset's own rate."""
        return self.index.spec.control_hz / self.stride

    @property
    def is_too_slow(self) -> bool:
        """True if the dataset is slower than `chunk_hz`, so that it keeps its own rate."""
        return self.index.spec.control_hz < self.chunk_hz

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever a sample or its number may."""
        facts = {
            "index": self.index.header.digest,
            "episodes": self.episodes.indices(self.index.header.counts["episodes"]),
            "filters": sorted(set(self.filters)),
            "views": self.views,
            "image_size": self.image_size,
            "action_horizon": self.action_horizon,
            "chunk_hz": self.chunk_hz,
            "action_dim": self.action_dim,
            "next_frames": self.next_frames,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def filtered_rows(self) -> int:
        """Number of rows of the episodes in use that the filters leave out."""
        return len(self._rows) - len(self)

    def __len__(self) -> int:
        if not self._filter:
            return len(self._rows)
        return int(self._kept[-1]) if len(self._kept) else 0

    def __repr__(self) -> str:
        return (
            f"StepSource({self.index.folder}, views={self.views}, filters={self.filters}, "
            f"action_horizon={self.action_horizon})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """The settings alone: another process maps the arrays itself."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def row(self, number: int) -> int:
        """The row in the index of a sample."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self}: sample {number} of {len(self)}")
        if not self._filter:
            return self._rows.start + number
        block = int(np.searchsorted(self._kept, number, side="right"))
        before = int(self._kept[block - 1]) if block else 0
        start = self._rows.start + block * _BLOCK
        flags = self.index.rows["flags"][start : min(start + _BLOCK, self._rows.stop)]
        return start + int(np.flatnonzero(flags & self._filter == 0)[number - before])

    def __getitem__(self, number: int) -> dict[str, Any]:
        samples, at = self.empty(1), np.array([0])
        self.fill(samples, at, np.array([operator.index(number)]))
        pixels = self.empty_pixels(1, Memory())
        self.read_frames(pixels, samples.pop("frames"), at)
        item = {name: values[0] for name, values in (samples | pixels).items()}
        # Next frames that were not read are the frames themselves.
        return {"next_images": item["images"], **item}

    def empty(self, count: int, state_dim: int = 0) -> dict[str, Any]:
        """Room for samples of any dataset of a mixture, for `fill`.

        Args:
          count: of samples.
          state_dim: width of the states, filled up with zeros; 0 for the dataset's own.

        Returns:
          What an item holds, with an axis in front, but for the pixels; and
          `frames` int64[N, V, 2], where each view's frame and next frame are stored, -1 for none.
        """
        chunk = (count, self.action_horizon, self.width)
        return {
            "frames": np.full((count, len(self.views), 2), -1),
            "view_mask": np.zeros((count, len(self.views)), bool),
            "state": np.zeros((count, state_dim or self.index.spec.state_dim), np.float32),
            "actions": np.zeros(chunk, np.float32),
            "action_mask": np.zeros(chunk, bool),
            "instruction": np.full(count, "", object),
            "annotation": np.full(count, None, object),
            "sample_id": np.zeros(count, np.int32),
        }

    def fill(self, samples: dict[str, Any], at: np.ndarray, numbers: np.ndarray) -> None:
        """Writes samples, all but their pixels, where there is room for them.

        Args:
          samples: of `empty`.
          at: int[N], the places.
          numbers: int[N], of the samples.
        """
        index = self.index
        rows = np.array([self.row(number) for number in numbers.tolist()])
        steps = index.rows[rows]
        episodes = index.episodes[steps["episode"]]
        ends = episodes["first_row"] + episodes["rows"]
        actions, inside = action_chunks(
            index.actions, rows, ends, self.action_horizon, self.absolute, self.stride
        )
        states = index.states[rows]
        own = actions.shape[-1]
        samples["actions"][at, :, :own] = actions
        samples["action_mask"][at, :, :own] = inside[:, :, None]
        samples["state"][at, : states.shape[-1]] = states
        samples["sample_id"][at] = rows
        texts = steps["instruction"].tolist()
        instructions = {text: index.texts[text] for text in dict.fromkeys(texts)}
        for place, row, text in zip(at.tolist(), rows.tolist(), texts, strict=True):
            samples["instruction"][place] = instructions[text]
            samples["annotation"][place] = index.annotation(row)

        # Where the chunk's first action leads to, unless that is past the end.
        reached = self._stored("next_frame", rows + self.stride - 1, episodes)
        for v, (camera, back) in enumerate(self._cameras):
            if camera is None:
                continue
            frame = self._stored("frame", rows - back * self.stride, episodes)
            later = np.where((reached < 0) | (back > 0), frame, reached)
            samples["frames"][at, v] = np.stack([frame, later], axis=1)
            samples["view_mask"][at, v] = frame >= 0

    def empty_pixels(self, count: int, memory: Memory) -> dict[str, np.ndarray]:
        """Room for frames of any dataset of a mixture, for `read_frames`: `images`, `next_mask`
        and, with `next_frames`, `next_images`."""
        shape = (count, len(self.views), *self.size, 3)
        return {
            "images": memory.array(shape),
            **({"next_images": memory.array(shape)} if self.next_frames else {}),
            "next_mask": np.zeros(shape[:2], bool),
        }

    def read_frames(
        self, pixels: dict[str, np.ndarray], frames: np.ndarray, at: np.ndarray
    ) -> None:
        """Reads samples' frames.

        Args:
          pixels: of `empty_pixels`.
          frames: of `fill`.
          at: int[N], the places of the samples in both.
        """
        names = ("images", "next_images") if self.next_frames else ("images",)
        for v, (camera, _) in enumerate(self._cameras):
            exists = frames[at, v, 0] >= 0
            for name in names:
                pixels[name][at[~exists], v] = 0
            if camera is None:
                continue
            here = at[exists]
            one, later = frames[here, v].T
            outs = [[pixels[name][b, v] for b in here.tolist()] for name in names]
            if self.next_frames:
                # A still scene teaches nothing about what comes next, and at the end nothing does.
                pixels["next_mask"][here, v] = self._reader.read_pairs(camera, one, later, *outs)
            else:
                self._reader.read(camera, one.tolist(), *outs)

    def _stored(self, column: str, rows: np.ndarray, episodes: np.ndarray) -> np.ndarray:
        """Where the frames of rows, int[N], are stored, -1 for none.

        Args:
          column: of ROW, "frame" or "next_frame".
          rows: perhaps beyond their episodes: such a row has none, nor has one of whose frames one
            does not decode if such rows are filtered out.
          episodes: EPISODE[N].

        Returns:
          int64[N], running numbers of stored frames.
        """
        first = episodes["first_row"]
        nearest = np.clip(rows, first, first + episodes["rows"] - 1)
        steps = self.index.rows[nearest]
        good = steps["flags"] & self._filter & FLAGS["bad_frame"] == 0
        return np.where(good & (nearest == rows), episodes["first_frame"] + steps[column], -1)

    @property
    def _roles(self) -> dict[str, str]:
        """The cameras of the index by role."""
        cameras = self.index.header.cameras
        return {role: name for role, name in self.index.spec.roles.items() if name in cameras}

    @cached_property
    def _cameras(self) -> tuple[tuple[str | None, int], ...]:
        """Each view's camera, None where the dataset lacks it, and by how many steps earlier."""
        found = []
        for view in self.views:
            camera, steps = parse_view(view)
            name = self._roles.get(camera, camera)
            found.append((name if name in self.index.header.cameras else None, steps))
        return tuple(found)

    @property
    def _sizes(self) -> dict[str, tuple[int, int]]:
        """(height, width) of the cameras in use."""
        cameras = self.index.header.cameras
        names = dict.fromkeys(camera for camera, _ in self._cameras if camera is not None)
        return {name: (cameras[name].height, cameras[name].width) for name in names}

    @cached_property
    def _reader(self) -> FrameReader:
        return FrameReader(self.index, self.image_size)

    @cached_property
    def _filter(self) -> int:
        """The flags that leave a row out."""
        return sum(FLAGS[name] for name in set(self.filters))

    @cached_property
    def _rows(self) -> range:
        """The rows of the episodes in use."""
        first, stop, _ = self.episodes.indices(self.index.header.counts["episodes"])
        if first >= stop:
            return range(0)
        last = self.index.episodes[stop - 1]
        start = int(self.index.episodes[first]["first_row"])
        return range(start, int(last["first_row"]) + int(last["rows"]))

    @cached_property
    def _kept(self) -> np.ndarray:
        """int64[blocks], the rows that the filters keep up to the end of each block of rows.

        This, 8 bytes for 256 rows, is all that is held in memory of which rows are kept.
        """
        counts = []
        for start in range(self._rows.start, self._rows.stop, _SCAN):
            # A mapping that is closed again, so that the pages seen do not add up.
            flags = self.index.array("rows.bin")["flags"]
            kept = flags[start : min(start + _SCAN, self._rows.stop)] & self._filter == 0
            counts.append(np.add.reduceat(kept, np.arange(0, len(kept), _BLOCK), dtype=np.int64))
        return np.cumsum(np.concatenate(counts)) if counts else np.zeros(0, np.int64)


def parse_view(text: str) -> tuple[str, int]:
    """A view's camera and by how many steps it is earlier: "primary@-2" -> ("primary", 2).

    Raises:
      ValueError: it is neither a camera nor one with steps to go back.
    """
    match = _VIEW.fullmatch(text)
    if match is None:
        raise ValueError(
            f"view {text!r}: expected a camera's role or name, perhaps with steps to go back, such "
            f"as 'primary', 'image_0' or 'primary@-2'"
        )
    return match[1], int(match[3] or 0)


@dataclass(frozen=True)
class Split:
    """A split, or a part of its episodes; bounds as in Python's slices, in percent where said."""

    name: str
    start: int | None = None
    stop: int | None = None
    start_is_percent: bool = False
    stop_is_percent: bool = False

    def episodes(self, count: int) -> slice:
        """The part of `count` episodes; percentages are rounded to the nearest episode."""

        def bound(value: int | None, is_percent: bool) -> int | None:
            return round(value * count / 100) if value is not None and is_percent else value

        start = bound(self.start, self.start_is_percent)
        stop = bound(self.stop, self.stop_is_percent)
        return slice(*slice(start, stop).indices(count)[:2])


def parse_split(text: str) -> Split:
    """Reads a split in TFDS's syntax: "train", "train[:95%]", "train[10:20]", "train[-5%:]".

    The parts are of episodes, never of steps, so that no episode is in two parts.

    Raises:
      ValueError: it is none of these, or a percentage is beyond 100.
    """
    match = _SPLIT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"split {text!r}: expected a name, perhaps with a part of its episodes, such as "
            f"'train', 'train[:95%]', 'train[10:20]' or 'train[-5%:]'"
        )
    name, start, start_percent, stop, stop_percent = match.groups()
    for value, percent in ((start, start_percent), (stop, stop_percent)):
        if percent and abs(int(value)) > 100:
            raise ValueError(f"split {text!r}: {value}% is more than all")
    return Split(
        name,
        None if start is None else int(start),
        None if stop is None else int(stop),
        start_is_percent=bool(start_percent),
        stop_is_percent=bool(stop_percent),
    )


def action_chunks(
    actions: np.ndarray,
    rows: np.ndarray,
    ends: np.ndarray,
    horizon: int,
    absolute: np.ndarray,
    stride: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """The actions from rows on, holding still past their episodes' ends.

    Args:
      actions: float32[R, A], of all episodes, in the data's units.
      rows: int[N], the first actions.
      ends: int[N], the row after each one's episode.
      horizon: C.
      absolute: bool[A], True for dimensions that hold their last value; the others become 0.
      stride: steps in an action of the chunk.

    Returns:
      float32[N, C, A] and bool[N, C], True where the action starts inside the episode.
    """
    wanted = rows[:, None, None] + np.arange(horizon * stride).reshape(horizon, stride)
    inside = wanted < ends[:, None, None]
    steps = actions[np.minimum(wanted, ends[:, None, None] - 1)]
    steps[~(inside[..., None] | absolute)] = 0
    last = steps[:, :, -1]
    merged = last if stride == 1 else np.where(absolute, last, steps.sum(axis=2))
    return merged, inside[:, :, 0]


def strided_actions(index: Index, stride: int) -> Iterator[np.ndarray]:
    """The actions of `stride` steps that chunks hold, from every row on, episode by episode.

    Yields:
      float32[N, A] of each episode of N rows, in the data's units.
    """
    absolute = np.array(index.spec.absolute_action)
    for episode in index.episodes:
        first, rows = int(episode["first_row"]), int(episode["rows"])
        every, end = np.arange(first, first + rows), np.full(rows, first + rows)
        yield action_chunks(index.actions, every, end, 1, absolute, stride)[0][:, 0]
