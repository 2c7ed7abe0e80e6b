"""A made-up source of encoded frames: files of JPEGs, episodes of random numbers."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg

from data_pipelines.index.format import (
    ENCODED,
    FLAGS,
    Camera,
    EpisodeEntry,
    SourceFile,
)
from data_pipelines.index.source import Shard, ShardFacts
from data_pipelines.oxe.spec import DatasetSpec
from lara_jax.tokenizers.prompt import Annotation

SPEC = DatasetSpec(
    name="made",
    control_hz=5,
    cameras={"front": "observation/front", "wrist": "observation/wrist"},
    roles={"primary": "front", "wrist": "wrist"},
    action=("action",),
    state=("observation/state",),
)
# Stored steps of the episodes in each file; one of a single step has no row, as after "drop_first".
EPISODES = ((4, 3), (5, 1, 2), (6,))


@dataclass(frozen=True)
class MadeSource:
    """An IndexSource; a shard a file."""

    source: str
    spec: DatasetSpec = SPEC
    dataset: str = "made"
    own_name: str = "made"
    version: str = "1.0.0"
    split: str = "train"
    cameras: tuple[str, ...] = ("front", "wrist")
    decode_frames: bool = False
    annotations: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def files(self) -> tuple[SourceFile, ...]:
        paths = sorted(Path(self.source).glob("frames-*"))
        return tuple(SourceFile(path=path.name, size=path.stat().st_size) for path in paths)

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(Shard(files=(i,), episodes=len(e)) for i, e in enumerate(EPISODES))

    def episodes(self, shard: int) -> Generator[EpisodeEntry, None, ShardFacts]:
        offset = 0
        for record, steps in enumerate(EPISODES[shard]):
            frames = {}
            for number, camera in enumerate(self.cameras):
                frames[camera] = np.zeros(steps, ENCODED)
                for step in range(steps):
                    data = jpeg(shard, record, step, number)
                    crc = google_crc32c.value(data)
                    frames[camera][step] = (shard, offset, len(data), crc)
                    offset += len(data)
            yield entry(shard, record, steps, frames)
        camera = Camera(kind="encoded", height=16, width=24)
        return ShardFacts(checksums=("",), cameras=dict.fromkeys(self.cameras, camera))

    def checksum(self, file: int) -> str:
        return ""


def jpeg(shard: int, record: int, step: int, camera: int) -> bytes:
    random = np.random.default_rng((shard, record, step, camera))
    pixels = random.integers(0, 256, (16, 24, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=95)


def entry(shard: int, record: int, steps: int, frames: Mapping[str, np.ndarray]) -> EpisodeEntry:
    """The first step is dropped."""
    random = np.random.default_rng((shard, record))
    rows = steps - 1
    flags = np.zeros(rows, np.uint8)
    flags[1::3] = FLAGS["bad_frame"]
    actions = random.normal(size=(rows, 7)).astype(np.float32)
    actions[2::3] = actions[1:2]
    actions[2::3, :3] = 0  # a pause
    annotation = Annotation(subtask=f"move {record}", boxes=((0.1, 0.2, 0.3, 0.4),), motion="up")
    return EpisodeEntry(
        key=f"made/{shard}/{record}",
        file=shard,
        record=record,
        success=[None, True, False][record],
        actions=actions,
        states=random.normal(size=(rows, 8)).astype(np.float32),
        frame=np.arange(1, steps),
        next_frame=np.minimum(np.arange(2, steps + 1), steps - 1),
        instructions=[f"task {shard}"] * rows,
        annotations=[annotation if row % 2 else None for row in range(rows)],
        flags=flags,
        frames=frames,
        stored_steps=steps,
    )


def make(folder: Path) -> MadeSource:
    """Writes the files."""
    folder.mkdir(parents=True)
    for shard, episodes in enumerate(EPISODES):
        images = (
            jpeg(shard, record, step, camera)
            for record, steps in enumerate(episodes)
            for camera in range(2)
            for step in range(steps)
        )
        (folder / f"frames-{shard}").write_bytes(b"".join(images))
    return MadeSource(str(folder))
