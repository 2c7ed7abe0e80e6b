"""A LeRobot data set as something that can be indexed: its episodes, and where their frames lie.

    data file     rows of an episode -> actions, states, instructions    (standardised by the spec)
    video file    row t -> the frame shown at from_seconds + t / fps     (pts, key frame's pts)

No frame is decoded for this, the videos' tables of contents are enough. The index of a video frame
is 20 bytes, and `data_pipelines.lerobot.video.read_frame` gives exactly that frame.
"""

import posixpath
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data_pipelines import storage
from data_pipelines.annotate.readers import AnnotationProvider, EpisodeName, LaraAnnotations
from data_pipelines.index.filters import bad_rows
from data_pipelines.index.format import VIDEO, Camera, EpisodeEntry, SourceFile
from data_pipelines.index.source import Shard, ShardFacts
from data_pipelines.lerobot.data import read_episodes
from data_pipelines.lerobot.layouts import definition
from data_pipelines.lerobot.meta import Episode, Metadata
from data_pipelines.lerobot.video import VideoTable, read_frame, scan
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardize import Standardized, required_keys, standardize
from lara_jax.tokenizers.prompt import Annotation

# How far a frame may be from its row's time: LeRobot's own rule.
TOLERANCE_SECONDS = 1e-4
# A shard has at least so many episodes (a data file is never divided), and a data set at most so
# many shards: each is sent to a process together with the list of all episodes.
EPISODES_PER_SHARD, SHARDS = 32, 64
# Videos whose tables are at hand while episodes are read in order: one a camera would do.
TABLES_KEPT = 8
_CHECKSUM_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class LeRobotSource:
    """A split of a LeRobot data set; `LeRobotSource.read` makes one. An `IndexSource`.

    Attributes:
      metadata: of the data set.
      split: as in info.json, or "all".
      spec: how to read it.
      without_tasks: episodes of these tasks are left out, and counted.
      provider: of reasoning annotations, by episode_index; None for the files in annotations/.
      decode_frames: decode every frame.
      flag_bad_frames: flag rows whose frames do not decode, instead of refusing the first one.
      tolerance_seconds: how far frames and rows may be from their times.
    """

    metadata: Metadata
    split: str
    spec: DatasetSpec
    without_tasks: frozenset[int] = frozenset()
    provider: AnnotationProvider | None = None
    decode_frames: bool = False
    flag_bad_frames: bool = False
    tolerance_seconds: float = TOLERANCE_SECONDS

    @classmethod
    def read(
        cls,
        path: storage.PathLike,
        split: str = "train",
        *,
        definitions: Mapping[str, DatasetSpec] | None = None,
        name: str | None = None,
        provider: AnnotationProvider | None = None,
        decode_frames: bool = False,
        flag_bad_frames: bool = False,
        tolerance_seconds: float = TOLERANCE_SECONDS,
    ) -> "LeRobotSource":
        """Reads what lies below meta/.

        Args:
          path: directory or URL.
          split: as in info.json, or "all".
          definitions: a user's datasets; the one called like the folder is taken.
          name: of another one, or of a layout; None to recognise the layout.
          provider: of annotations; None for the files in annotations/, if there are any.
          decode_frames, flag_bad_frames, tolerance_seconds: see the class.

        Raises:
          FileNotFoundError: `path` is no LeRobot data set, or is not complete.
          ValueError: there is no such split, or the data set cannot be read by such a spec.
        """
        metadata = Metadata.read(storage.absolute(path))
        spec, without_tasks = definition(metadata, definitions, name)
        source = cls(
            metadata=metadata,
            split=split,
            spec=spec,
            without_tasks=without_tasks,
            provider=provider,
            decode_frames=decode_frames,
            flag_bad_frames=flag_bad_frames,
            tolerance_seconds=tolerance_seconds,
        )
        if not source.selected:
            raise ValueError(f"{metadata.root}: split {split!r} has no episode")
        return source

    @property
    def dataset(self) -> str:
        """The dataset's name: that of its definition, whatever the folder is called."""
        return self.spec.name

    @property
    def own_name(self) -> str:
        """The folder's name: the files say none."""
        return self.metadata.root.rpartition("/")[2]

    @property
    def version(self) -> str:
        """Of the format."""
        return self.metadata.codebase_version

    @property
    def source(self) -> str:
        """Absolute path or URL."""
        return self.metadata.root

    @property
    def annotations(self) -> Mapping[str, Any]:
        """What the reasoning comes from; empty where there is none."""
        return {"fingerprint": self.reasoning.fingerprint} if self.reasoning else {}

    @cached_property
    def reasoning(self) -> AnnotationProvider | None:
        """Where annotations come from; None where there are none."""
        if self.provider is not None:
            return self.provider
        paths = find_annotations(self.metadata.root)
        return LaraAnnotations.read(*map(Path, paths)) if paths else None

    @property
    def cameras(self) -> tuple[str, ...]:
        """By the spec's names."""
        return tuple(self.spec.cameras)

    @cached_property
    def selected(self) -> tuple[Episode, ...]:
        """The episodes of the split, those of tasks that are left out, too."""
        return self.metadata.of_split(self.split)

    def is_left_out(self, episode: Episode) -> bool:
        """True for an episode of a task that is left out."""
        tasks = self.metadata.tasks
        return any(tasks.get(index) in episode.tasks for index in self.without_tasks)

    @cached_property
    def shard_episodes(self) -> tuple[tuple[Episode, ...], ...]:
        """The episodes of each shard: whole data files, several if they are small."""
        by_file: dict[str, list[Episode]] = defaultdict(list)
        for episode in self.selected:
            by_file[episode.data_file].append(episode)
        least = max(EPISODES_PER_SHARD, -(-len(self.selected) // SHARDS))
        groups: list[list[Episode]] = []
        for episodes in by_file.values():
            if not groups or len(groups[-1]) >= least:
                groups.append([])
            groups[-1] += episodes
        return tuple(map(tuple, groups))

    @cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """Metadata, annotations, data files, then videos; see `IndexSource`.

        Raises:
          FileNotFoundError: one is missing.
          ValueError: a camera holds images instead of a video.
        """
        self._check_videos()
        names = dict.fromkeys(self.metadata.files)
        if self.provider is None:
            root = self.metadata.root
            names |= dict.fromkeys(p.removeprefix(f"{root}/") for p in find_annotations(root))
        names |= dict.fromkeys(episode.data_file for episode in self.selected)
        for key in self.spec.cameras.values():
            names |= dict.fromkeys(episode.videos[key].file for episode in self.selected)
        folders: dict[str, list[str]] = defaultdict(list)
        for name in names:
            folders[posixpath.dirname(name)].append(name)
        facts: dict[str, storage.FileFacts | None] = {}
        for folder, members in folders.items():
            place = storage.join(self.metadata.root, folder)
            try:
                found = storage.facts(place, [posixpath.basename(name) for name in members])
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self.metadata.root} has no folder {folder}") from error
            facts |= zip(members, found, strict=True)
        missing = [name for name, found in facts.items() if found is None]
        if missing:
            raise FileNotFoundError(
                f"{self.metadata.root} lacks {len(missing)} of {len(names)} files: {missing[0]}"
                f"{', ...' if len(missing) > 1 else ''}"
            )
        there = ((name, fact) for name in names if (fact := facts[name]) is not None)
        return tuple(SourceFile(path=name, size=f.size, stamp=f.stamp) for name, f in there)

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """See `IndexSource`."""
        shards = []
        for episodes in self.shard_episodes:
            files = dict.fromkeys(self._numbers[episode.data_file] for episode in episodes)
            for key in self.spec.cameras.values():
                files |= dict.fromkeys(self._numbers[e.videos[key].file] for e in episodes)
            shards.append(Shard(files=tuple(files), episodes=len(episodes)))
        return tuple(shards)

    def episodes(self, shard: int) -> Generator[EpisodeEntry, None, ShardFacts]:
        """See `IndexSource`.

        Raises:
          FileNotFoundError: a data or video file is missing.
          ValueError: a file is damaged, or data, videos and metadata do not fit each other.
        """
        cameras: dict[str, Camera] = {}
        table_of = lru_cache(maxsize=TABLES_KEPT)(scan)
        success = [self.spec.success] if self.spec.success else []
        for episode, raw in self.raw(shard, [*required_keys(self.spec), *success]):
            if raw is None:
                yield self._left_out(episode)
                continue
            frames = {}
            for camera, key in self.spec.cameras.items():
                file = episode.videos[key].file
                table = table_of(storage.join(self.metadata.root, file))
                cameras.setdefault(
                    camera, Camera(kind="video", height=table.height, width=table.width)
                )
                at = self.frames_of(episode, key, table)
                places = np.zeros(episode.length, VIDEO)
                places["file"] = self._numbers[file]
                places["pts"], places["keyframe_pts"] = table.pts[at], table.keyframe_pts[at]
                frames[camera] = places
            succeeded = bool(np.any(raw[self.spec.success])) if success else None
            yield self._entry(episode, standardize(self.spec, raw), frames, succeeded)
        checksums = tuple(self.checksum(file) for file in self.shards[shard].files)
        return ShardFacts(checksums=checksums, cameras=cameras)

    def raw(
        self, shard: int, columns: Sequence[str]
    ) -> Iterator[tuple[Episode, Mapping[str, Any] | None]]:
        """The episodes of a shard with their columns; None for an episode that is left out."""
        for file in dict.fromkeys(episode.data_file for episode in self.shard_episodes[shard]):
            episodes = [
                episode for episode in self.shard_episodes[shard] if episode.data_file == file
            ]
            wanted = [episode for episode in episodes if not self.is_left_out(episode)]
            rows = (
                read_episodes(
                    self.metadata, wanted, columns, tolerance_seconds=self.tolerance_seconds
                )
                if wanted
                else {}
            )
            for episode in episodes:
                yield episode, rows.get(episode.number)

    def frames_of(self, episode: Episode, key: str, table: VideoTable) -> np.ndarray:
        """The frames of an episode's steps: int64[T], positions in its video's table.

        Raises:
          ValueError: the video has fewer frames, or none at the time of a step.
        """
        if len(table) < episode.length:
            raise ValueError(
                f"{table.path} has {len(table)} frames; episode {episode.number} has "
                f"{episode.length} rows in {episode.data_file}"
            )
        fps = self.metadata.fps
        seconds = episode.videos[key].from_seconds + np.arange(episode.length) / fps
        try:
            return table.frames_at(seconds, tolerance_seconds=self.tolerance_seconds)
        except ValueError as error:
            raise ValueError(
                f"episode {episode.number}, {fps:g} steps a second: {error}"
            ) from error

    def annotated(self, episode: Episode) -> Mapping[int, Annotation]:
        """The annotations of an episode by stored step.

        Raises:
          ValueError: there is one of a step that the episode does not have.
        """
        name = EpisodeName(
            key=key_of(episode),
            number=episode.number,
            dataset=self.own_name,
            split=self.split,
            stored_steps=episode.length,
        )
        steps = (self.reasoning and self.reasoning.episode(name)) or {}
        if steps and max(steps) >= episode.length:
            raise ValueError(
                f"{self.metadata.root}, episode {episode.number}: an annotation of step "
                f"{max(steps)}; the episode has steps 0..{episode.length - 1}"
            )
        return steps

    def checksum(self, file: int) -> str:
        """CRC-32C of the whole file: neither parquet nor MP4 files carry one."""
        crc = google_crc32c.Checksum()
        with storage.open_read(storage.join(self.metadata.root, self.files[file].path)) as stream:
            while block := stream.read(_CHECKSUM_BLOCK):
                crc.update(block)
        return crc.hexdigest().decode()

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        """The number of each file in `files`."""
        return {file.path: number for number, file in enumerate(self.files)}

    def _check_videos(self) -> None:
        for camera, key in self.spec.cameras.items():
            if self.metadata.features[key].dtype != "video":
                raise ValueError(
                    f"{self.metadata.root}: camera {camera!r} ({key}) is stored as images in the "
                    f"parquet files, which cannot be read frame by frame; convert the data set to "
                    f"RLDS first (launch/beam.sh lerobot_to_rlds)"
                )

    def _entry(
        self,
        episode: Episode,
        steps: Standardized,
        frames: Mapping[str, np.ndarray],
        success: bool | None,
    ) -> EpisodeEntry:
        annotated = self.annotated(episode)
        bad = self._damaged(frames) if self.decode_frames else np.zeros(episode.length, bool)
        return EpisodeEntry(
            key=key_of(episode),
            file=self._numbers[episode.data_file],
            record=episode.number,
            success=success,
            actions=steps.actions,
            states=steps.states,
            frame=steps.frame,
            next_frame=steps.next_frame,
            instructions=steps.instructions,
            annotations=tuple(annotated.get(int(step)) for step in steps.frame),
            flags=bad_rows(bad, steps.frame, steps.next_frame),
            frames=frames,
            stored_steps=episode.length,
        )

    def _damaged(self, frames: Mapping[str, np.ndarray]) -> np.ndarray:
        """bool[T], steps of which a camera's frame does not decode."""
        bad = np.zeros(max(map(len, frames.values()), default=0), bool)
        for places in frames.values():
            for step, (file, pts, keyframe_pts) in enumerate(places.tolist()):
                path = storage.join(self.metadata.root, self.files[file].path)
                try:
                    read_frame(path, pts, keyframe_pts)
                except ValueError:
                    if not self.flag_bad_frames:
                        raise
                    bad[step] = True
        return bad

    def _left_out(self, episode: Episode) -> EpisodeEntry:
        """An episode without rows, which an index counts."""
        nothing = np.zeros(0, np.int32)
        return EpisodeEntry(
            key=key_of(episode),
            file=self._numbers[episode.data_file],
            record=episode.number,
            success=None,
            actions=np.zeros((0, self.spec.action_dim), np.float32),
            states=np.zeros((0, self.spec.state_dim), np.float32),
            frame=nothing,
            next_frame=nothing,
            instructions=(),
            annotations=(),
            flags=nothing.astype(np.uint8),
            frames={},
            stored_steps=episode.length,
            left_out=True,
        )


def key_of(episode: Episode) -> str:
    """What identifies an episode in annotation files: "episode_000007"."""
    return f"episode_{episode.number:06d}"


def find_annotations(root: str) -> tuple[str, ...]:
    """LaRA-VLA's annotations in the folder annotations/ of a data set.

    Returns:
      The file of captions, then that of boxes if there is one; () where there is no such file.

    Raises:
      ValueError: there are several of a kind, or boxes without captions, or they are not local.
    """
    folder = storage.join(root, "annotations")
    if not storage.exists(folder):
        return ()
    names = sorted(name for name in storage.list_files(folder) if name.endswith(".jsonl"))
    captions = [name for name in names if "captions" in name]
    boxes = [name for name in names if "bboxes" in name]
    if not captions and not boxes:
        return ()
    if len(captions) != 1 or len(boxes) > 1:
        raise ValueError(
            f"{folder} should hold one *captions*.jsonl and at most one *bboxes*.jsonl; it has "
            f"{', '.join(captions + boxes)}: move those that are not meant elsewhere"
        )
    if not storage.is_local(folder):
        raise ValueError(
            f"{folder}: annotation files are read from local folders only; the data set can be "
            f"read without that folder, and annotations given by name (--annotations)"
        )
    return tuple(storage.join(folder, name) for name in captions + boxes)
