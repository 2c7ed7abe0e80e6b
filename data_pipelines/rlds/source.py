"""An RLDS split as the source of an index: each record read once, nothing of it copied but numbers.

    record (bytes) -> wire.scan -> where each JPEG lies             -> frames
                                -> raw steps -> oxe.standardize     -> actions, states, words
                                -> success, key, reasoning          -> flags, annotations

One file of the split is one shard of the index, one record one episode.
"""

import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np

from data_pipelines import storage
from data_pipelines.annotate.schema import checked_box
from data_pipelines.frames import decode_image, encoded_size
from data_pipelines.index.filters import bad_rows
from data_pipelines.index.format import ENCODED, Camera, EpisodeEntry, SourceFile
from data_pipelines.index.source import Shard, ShardFacts
from data_pipelines.oxe.registry import spec_named
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardize import Standardized, required_keys, standardize
from data_pipelines.rlds import wire
from data_pipelines.rlds.directory import FLOATS, INTEGERS, STEPS, Directory, Feature
from data_pipelines.rlds.tfrecord import (
    Record,
    checksum_of,
    read_records,
    where_record,
)
from lara_jax.tokenizers.prompt import Annotation

Lists = Mapping[str, wire.ListView]


@dataclass(frozen=True, kw_only=True)
class RldsSource:
    """A split of a TFDS version directory; `RldsSource.read` makes one.

    Attributes:
      directory: the version directory.
      split: the split's name.
      spec: the dataset.
      cameras: those of the spec that features.json has.
      files: the split's files with their sizes and stamps.
      decode_frames: decode every frame.
      flag_bad_frames: flag rows whose frames do not decode, instead of refusing the first one.
    """

    directory: Directory
    split: str
    spec: DatasetSpec
    cameras: tuple[str, ...]
    files: tuple[SourceFile, ...]
    decode_frames: bool = False
    flag_bad_frames: bool = False

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        split: str,
        *,
        name: str | None = None,
        definitions: Mapping[str, DatasetSpec] | None = None,
        decode_frames: bool = False,
        flag_bad_frames: bool = False,
    ) -> "RldsSource":
        """Reads what a directory says about itself, and lists the split's files.

        Args:
          path: the version directory or its URL.
          split: such as "train".
          name: of the dataset; None for what dataset_info.json says.
          definitions: datasets besides the registry's.
          decode_frames, flag_bad_frames: see the class.

        Raises:
          FileNotFoundError: no such directory, or a file of the split is missing.
          ValueError: unknown dataset or split; a feature that the dataset's definition names is not
            in features.json, or none of its cameras is.
        """
        directory = Directory.read(storage.absolute(path))
        try:
            spec = spec_named(name or directory.name, definitions)
        except ValueError as error:
            raise ValueError(
                f"{directory.path}: {error} If it is one that is known, say which (--name)."
            ) from error
        for key in required_keys(spec):
            directory.feature(f"{STEPS}/{key}")
        if spec.success:
            directory.feature(spec.success)
        cameras = tuple(
            camera for camera, key in spec.cameras.items() if f"{STEPS}/{key}" in directory.features
        )
        if not cameras:
            directory.feature(f"{STEPS}/{next(iter(spec.cameras.values()))}")
        names = [os.path.basename(file) for file in directory.split(split).files]
        files = zip(names, directory.facts(split), strict=True)
        return cls(
            directory=directory,
            split=split,
            spec=spec,
            cameras=cameras,
            files=tuple(
                SourceFile(path=name, size=facts.size, stamp=facts.stamp) for name, facts in files
            ),
            decode_frames=decode_frames,
            flag_bad_frames=flag_bad_frames,
        )

    @property
    def dataset(self) -> str:
        """The dataset's name: that of its definition, whatever the directory calls it."""
        return self.spec.name

    @property
    def own_name(self) -> str:
        """What the directory calls it."""
        return self.directory.name

    @property
    def version(self) -> str:
        """The dataset's version."""
        return self.directory.version

    @property
    def source(self) -> str:
        """The version directory, from the root on, or its URL."""
        return str(self.directory.path)

    @property
    def annotations(self) -> Mapping[str, Any]:
        """The records' own, if features.json has them."""
        return {"fingerprint": "records"} if self._reasoning else {}

    @property
    def shards(self) -> tuple[Shard, ...]:
        """One for each file."""
        lengths = self.directory.split(self.split).shard_lengths
        return tuple(Shard(files=(file,), episodes=length) for file, length in enumerate(lengths))

    def checksum(self, file: int) -> str:
        """The checksum over a file's CRCs as they are now; a ValueError names a corrupt record."""
        return checksum_of(record.crc for record in read_records(self._path(file)))

    def episodes(self, shard: int) -> Generator[EpisodeEntry, None, ShardFacts]:
        """Yields the file's episodes.

        Raises:
          FileNotFoundError: the file is gone.
          ValueError: the file is truncated or corrupt, has another number of records than
            dataset_info.json says, or a record is not as features.json and the dataset's
            definition say. The message names file and record.
        """
        path, crcs, cameras = self._path(shard), [], dict[str, Camera]()
        for record in read_records(path):
            try:
                entry = self._entry(shard, record, cameras)
            except ValueError as error:
                raise ValueError(f"{where_record(path, record.number)}: {error}") from error
            crcs.append(record.crc)
            yield entry
        expected = self.shards[shard].episodes
        if len(crcs) != expected:
            raise ValueError(f"{path} has {len(crcs)} records; dataset_info.json says {expected}")
        return ShardFacts(checksums=(checksum_of(crcs),), cameras=cameras)

    def _path(self, file: int) -> str:
        return storage.join(self.source, self.files[file].path)

    def _entry(self, file: int, record: Record, cameras: dict[str, Camera]) -> EpisodeEntry:
        """An episode; enters the cameras' sizes at the first frame."""
        try:
            lists = wire.scan(record.payload)
        except ValueError as error:
            raise ValueError(f"not a tf.train.Example ({error})") from error
        raw = {
            key: self._values(lists, self.directory.feature(f"{STEPS}/{key}"))
            for key in required_keys(self.spec)
        }
        frames = {camera: self._frames(file, record, lists, camera) for camera in self.cameras}
        lengths = {key: len(values) for key, values in (raw | frames).items()}
        steps = next(iter(lengths.values()))
        if set(lengths.values()) != {steps}:
            raise ValueError(f"step features of different lengths: {lengths}")
        for camera, places in frames.items():
            if camera not in cameras:
                self._enter_size(record, camera, places, cameras)
        standard = standardize(self.spec, raw) if steps else self._nothing()
        annotations = self._annotations(lists, steps)
        return EpisodeEntry(
            key=self._key(lists),
            file=file,
            record=record.number,
            success=self._success(lists),
            actions=standard.actions,
            states=standard.states,
            frame=standard.frame,
            next_frame=standard.next_frame,
            instructions=standard.instructions,
            annotations=[annotations[step] for step in standard.frame] if annotations else (),
            flags=bad_rows(self._bad(record, frames, steps), standard.frame, standard.next_frame),
            frames=frames,
            stored_steps=steps,
        )

    def _enter_size(
        self, record: Record, camera: str, places: np.ndarray, cameras: dict[str, Camera]
    ) -> None:
        """Enters the size of a camera's first frame: of its first good one where some may be bad.

        Those before it are flagged, as they do not decode either.
        """
        for step, place in enumerate(places):
            try:
                data = _frame_bytes(record, place)
                height, width = encoded_size(data, _where_frame(step, camera))
            except ValueError:
                if not (self.decode_frames and self.flag_bad_frames):
                    raise
                continue
            cameras[camera] = Camera(kind="encoded", height=height, width=width)
            return

    def _nothing(self) -> Standardized:
        """An episode without steps."""
        none = np.zeros(0, np.int32)
        return Standardized(
            actions=np.zeros((0, self.spec.action_dim), np.float32),
            states=np.zeros((0, self.spec.state_dim), np.float32),
            frame=none,
            next_frame=none,
            instructions=(),
        )

    def _list(self, lists: Lists, key: str) -> wire.ListView:
        if key not in lists:
            raise ValueError(
                f"feature {key!r} is missing; the record has: {', '.join(sorted(lists))}"
            )
        return lists[key]

    def _values(self, lists: Lists, feature: Feature) -> np.ndarray | list[bytes]:
        """A feature's values: dtype[T, *shape] of a step's numbers, byte strings as they are."""
        found = self._list(lists, feature.key)
        is_number = feature.dtype in FLOATS | INTEGERS
        if not (is_number or found.kind in ("", "bytes_list")) or None in feature.shape:
            raise ValueError(
                f"feature {feature.key!r}, {feature.kind} of {feature.dtype} and shape "
                f"{feature.shape}, cannot be read"
            )
        try:
            if found.kind == "bytes_list" or not is_number:
                return found.strings()
            shape = [size for size in feature.shape if size is not None]
            values = found.numbers().astype(feature.dtype)
            return values.reshape([-1, *shape] if feature.per_step else shape)
        except ValueError as error:
            raise ValueError(
                f"feature {feature.key!r} of shape {feature.shape}: {error}"
            ) from error

    def _frames(self, file: int, record: Record, lists: Lists, camera: str) -> np.ndarray:
        """Where a camera's frames lie: ENCODED[T]."""
        key = f"{STEPS}/{self.spec.cameras[camera]}"
        try:
            offsets, lengths = self._list(lists, key).spans()
        except ValueError as error:
            raise ValueError(f"camera {camera!r}, feature {key!r}: {error}") from error
        view = np.frombuffer(record.payload, np.uint8)  # a slice of it is no copy
        frames = np.empty(len(offsets), ENCODED)
        frames["file"] = file
        frames["offset"] = offsets
        frames["offset"] += record.offset
        frames["length"] = lengths
        frames["crc"] = [
            google_crc32c.value(view[offset : offset + length])
            for offset, length in zip(offsets, lengths, strict=True)
        ]
        return frames

    def _key(self, lists: Lists) -> str:
        """What identifies the episode in annotation files: its key features, joined."""
        parts = []
        for key in self.spec.episode_key:
            if key in lists:
                values = self._values(lists, self.directory.feature(key))
                first = values[0] if isinstance(values, list) else values.item()
                parts.append(first.decode("utf-8") if isinstance(first, bytes) else str(first))
        return "_".join(parts)

    def _success(self, lists: Lists) -> bool | None:
        if not self.spec.success:
            return None
        values = self._values(lists, self.directory.feature(self.spec.success))
        if isinstance(values, list) or values.size != 1:
            raise ValueError(f"feature {self.spec.success!r} is not one number")
        return bool(values.item())

    def _bad(self, record: Record, frames: Mapping[str, np.ndarray], steps: int) -> np.ndarray:
        """bool[T], True where a camera's frame does not decode."""
        bad = np.zeros(steps, bool)
        for camera, places in frames.items() if self.decode_frames else ():
            for step, place in enumerate(places):
                try:
                    decode_image(_frame_bytes(record, place), _where_frame(step, camera))
                except ValueError:
                    if not self.flag_bad_frames:
                        raise
                    bad[step] = True
        return bad

    @cached_property
    def _reasoning(self) -> tuple[str, str, str] | None:
        """The features of subtask, boxes and motion if the directory has them: all, or none."""
        if self.spec.reasoning is None:
            return None
        keys = self.spec.reasoning
        subtask, boxes, motion = (f"{STEPS}/{k}" for k in (keys.subtask, keys.boxes, keys.motion))
        if not any(key in self.directory.features for key in (subtask, boxes, motion)):
            return None
        for key in (subtask, boxes, motion):
            self.directory.feature(key)
        return subtask, boxes, motion

    def _annotations(self, lists: Lists, steps: int) -> Sequence[Annotation | None]:
        """One a stored step, None where a step has neither text nor box; () for none at all.

        Raises:
          ValueError: a box is inverted, outside the image or not finite; names step and box.
        """
        if self._reasoning is None:
            return ()
        subtask, boxes, motion = (
            self._values(lists, self.directory.feature(key)) for key in self._reasoning
        )
        values = (subtask, boxes, motion)
        lengths = {key: len(v) for key, v in zip(self._reasoning, values, strict=True)}
        if set(lengths.values()) != {steps}:
            raise ValueError(f"the episode has {steps} steps, its reasoning {lengths}")
        if not isinstance(boxes, np.ndarray) or boxes.ndim != 3 or boxes.shape[2] != 4:
            raise ValueError(f"feature {self._reasoning[1]!r} holds no boxes (n, 4) a step")
        visible = ~np.isnan(boxes).all(axis=2)  # an absent box is a row of NaN
        visible &= visible[:, :1]  # without its object, a destination would be taken for one
        found: list[Annotation | None] = []
        for step in range(steps):
            words = [str(texts[step], "utf-8") for texts in (subtask, motion)]
            seen = [
                checked_box(boxes[step, at].tolist(), f"step {step}, box {at}")
                for at in np.flatnonzero(visible[step])
            ]
            empty = not (any(words) or seen)
            found.append(None if empty else Annotation(words[0], tuple(seen), words[1]))
        return found


def _frame_bytes(record: Record, place: np.void) -> bytes:
    start = int(place["offset"]) - record.offset
    return record.payload[start : start + int(place["length"])]


def _where_frame(step: int, camera: str) -> str:
    return f"step {step}, camera {camera!r}"
