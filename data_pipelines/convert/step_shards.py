"""An index's frames as step records: one file's conversion, and the index of the result.

    files of the source        files of the output
    x.tfrecord-00000-of-2  ->  tiny_set-train.array_record-00000-of-00002   records 0, 1, 2, ...
    x.tfrecord-00001-of-2  ->  tiny_set-train.array_record-00001-of-00002   records 0, 1, 2, ...

Each file becomes one file, in which the records follow the index's order. So where a frame lies
afterwards follows from how many steps each episode has: the output's index is the source's index
with other places of the frames, and a loader reads either. Episodes that the index leaves out, and
cameras that are not chosen, are not in the output.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import google_crc32c
import numpy as np

from data_pipelines import storage
from data_pipelines.convert import step_records
from data_pipelines.convert.shared_index import shared_index
from data_pipelines.index.format import (
    RECORD,
    Index,
    SourceFile,
)
from data_pipelines.index.writer import IndexWriter


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """A file of the output.

    Attributes:
      shard: its number.
      path: relative to the output.
      size: bytes.
      episodes, steps: how many it holds; a step is a record.
    """

    shard: int
    path: str
    size: int
    episodes: int
    steps: int


def check_cameras(index: Index, cameras: Sequence[str]) -> None:
    """Refuses cameras that an index does not have or whose frames are no encoded images."""
    known = index.header.cameras
    unknown = sorted(set(cameras) - set(known))
    if unknown or not cameras:
        raise ValueError(f"cameras {unknown}: {index.folder} has {', '.join(known)}")
    for camera in cameras:
        if known[camera].kind != "encoded":
            raise ValueError(
                f"{index.folder}: the frames of camera {camera!r} are of kind "
                f"{known[camera].kind!r}; only encoded images become step records "
                f"(lerobot_to_rlds makes images of videos)"
            )


def shard_count(index: Index) -> int:
    """How many files the output has: as many as the source has with episodes."""
    return len(np.unique(index.episodes["file"]))


def write_shard(index: Index, shard: int, output: str, cameras: Sequence[str]) -> WrittenShard:
    """Writes one file of the output.

    Args:
      index: of the source.
      shard: the file's number, in [0, shard_count(index)).
      output: directory or URL.
      cameras: whose frames to keep.

    Raises:
      FileNotFoundError: the source's file is gone.
      ValueError: it is not what was indexed.
    """
    header, shards = index.header, shard_count(index)
    name = f"{header.dataset}-{header.split}.array_record-{shard:05d}-of-{shards:05d}"
    path = storage.join(output, name)
    file = np.unique(index.episodes["file"])[shard]
    episodes = index.episodes[index.episodes["file"] == file]
    steps = (step for episode in episodes for step in _steps(index, episode, cameras))
    count = step_records.write(path, steps)
    return WrittenShard(
        shard=shard, path=name, size=storage.size(path), episodes=len(episodes), steps=count
    )


def write_shard_of(
    folder: str, source: str, output: str, cameras: Sequence[str], shard: int
) -> WrittenShard:
    """`write_shard` for a worker, which opens the index itself (see `shared_index`).

    Args:
      folder, source: of the index: its own place, and that of the data.
      output, cameras, shard: as for `write_shard`.
    """
    return write_shard(shared_index(folder, source), shard, output, cameras)


def write_records_index(
    folder: str | os.PathLike[str],
    index: Index,
    shards: Sequence[WrittenShard],
    output: str,
    cameras: Sequence[str],
) -> Index:
    """Writes the index of the output.

    Args:
      folder: where to put it.
      index: of the source.
      shards: all files, in any order.
      output: the directory or URL where they lie.
      cameras: whose frames they hold.

    Raises:
      ValueError: a file is missing or there twice.
    """
    shards = sorted(shards, key=lambda shard: shard.shard)
    if [shard.shard for shard in shards] != list(range(shard_count(index))):
        found = [shard.shard for shard in shards]
        raise ValueError(f"{output}: files {found} were written; {shard_count(index)} make it up")
    header = replace(
        index.header,
        source=storage.absolute(output),
        cameras={name: replace(index.header.cameras[name], kind="record") for name in cameras},
        files=tuple(SourceFile(path=shard.path, size=shard.size) for shard in shards),
    )
    episodes, places = _moved(index)
    with IndexWriter(folder) as writer:
        writer.extend(index, episodes=episodes, frames=dict.fromkeys(cameras, places))
        return writer.finish(header)


def _moved(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """The index's episodes and where their frames lie in the output: EPISODE[E], RECORD[F]."""
    episodes, lengths = index.episodes.copy(), index.episodes["frames"].astype(np.int64)
    _, episodes["file"] = np.unique(index.episodes["file"], return_inverse=True)
    for file in range(shard_count(index)):
        mine = episodes["file"] == file
        episodes["record"][mine] = np.cumsum(lengths[mine]) - lengths[mine]
    places = np.empty(int(lengths.sum()), RECORD)
    places["file"] = np.repeat(episodes["file"], lengths)
    places["record"] = np.repeat(episodes["record"] - episodes["first_frame"], lengths)
    places["record"] += np.arange(len(places))
    return episodes, places


def _steps(index: Index, episode: np.void, cameras: Sequence[str]) -> Iterator[Mapping[str, bytes]]:
    """The encoded frames of an episode, step by step."""
    images = [_images(index, episode, camera) for camera in cameras]
    for frames in zip(*images, strict=True):
        yield dict(zip(cameras, frames, strict=True))


def _images(index: Index, episode: np.void, camera: str) -> list[bytes]:
    """All encoded frames of one camera in an episode, in one read."""
    first = int(episode["first_frame"])
    places = index.frames[camera][first : first + int(episode["frames"])]
    path = storage.join(index.source, index.header.files[int(episode["file"])].path)
    start = int(places["offset"].min())
    end = int((places["offset"] + places["length"]).max())
    block = storage.read_range(path, start, end - start)
    images = []
    for step, (_, offset, length, crc) in enumerate(places.tolist()):
        images.append(block[offset - start : offset - start + length])
        if google_crc32c.value(images[-1]) != crc:
            raise ValueError(
                f"{path}, record {episode['record']}, step {step}, camera {camera!r}: the bytes "
                f"are not those that were indexed: the file is damaged or another one"
            )
    return images
