"""Makes small indexes by hand, with real frames behind them, for tests."""

from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from data_pipelines.index.format import (
    ENCODED,
    Camera,
    EpisodeEntry,
    Header,
    Index,
    SourceFile,
)
from data_pipelines.index.writer import write_index
from data_pipelines.oxe.spec import DatasetSpec
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.handmade import encode

SIZE = (16, 24)
SPEC = DatasetSpec(
    name="made",
    robot="a robot",
    control_hz=5.0,
    cameras={"image": "observation/image"},
    roles={"primary": "image"},
    action=("action",),
    state=("observation/state",),
)


def vectors(seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Random float32[N, 7] actions and float32[N, 8] states; state 6 is constant, the pad."""
    random = np.random.default_rng(seed)
    actions = random.normal(size=(rows, 7)).astype(np.float32)
    actions[:, 6] = random.integers(0, 2, rows)
    states = random.normal(size=(rows, 8)).astype(np.float32)
    states[:, 6] = 0.1
    return actions, states


def write(
    folder: Path,
    lengths: Sequence[int],
    *,
    spec: DatasetSpec = SPEC,
    flags: Sequence[int] = (),
    instruction: str = "put the <b>cup</b> & plate down",
    annotation: Annotation | None = None,
    frames: bool = False,
) -> Index:
    """An index of episodes of these lengths; flags of all rows, in order; noise for frames."""
    source = folder.parent / "source"
    source.mkdir(parents=True, exist_ok=True)
    data = bytearray()
    entries = []
    for number, rows in enumerate(lengths):
        actions, states = vectors(number, rows)
        first = sum(lengths[:number])
        places = np.zeros(rows, ENCODED)
        for step in range(rows if frames else 0):
            pixels = np.random.default_rng([number, step]).integers(0, 256, (*SIZE, 3), np.uint8)
            jpeg = encode(pixels)
            places[step] = (0, len(data), len(jpeg), google_crc32c.value(jpeg))
            data += jpeg
        steps = np.arange(rows, dtype=np.int32)
        entries.append(
            EpisodeEntry(
                key=f"episode_{number}",
                file=0,
                record=number,
                success=None,
                actions=actions,
                states=states,
                frame=steps,
                next_frame=np.minimum(steps + 1, rows - 1),
                instructions=[instruction] * rows,
                annotations=[annotation] * rows,
                flags=np.array(flags[first : first + rows] or [0] * rows, np.uint8),
                frames={"image": places},
                stored_steps=rows,
            )
        )
    (source / "frames.bin").write_bytes(data)
    header = Header(
        dataset=spec.name,
        version="1.0.0",
        split="train",
        source=str(source),
        spec=spec,
        cameras={"image": Camera(kind="encoded", height=SIZE[0], width=SIZE[1])},
        files=(SourceFile(path="frames.bin", size=len(data)),),
    )
    return write_index(folder, header, entries)
