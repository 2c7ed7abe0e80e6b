"""A small index of pick-and-place episodes whose phases are known, with noise for images."""

from pathlib import Path

import google_crc32c
import numpy as np

from data_pipelines.annotate.readers import EpisodeName
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
from tests.data_pipelines.handmade import encode

SPEC = DatasetSpec(
    name="small",
    control_hz=5.0,
    cameras={"image": "observation/image"},
    roles={"primary": "image"},
    action=("action",),
    state=("observation/state",),
    rows=("drop_first",),
)
HEIGHT, WIDTH = 16, 24
# Rows: approach 4 (forward and left, then down), grasp 2, move 4 (up, then right), release 2,
# retreat 3 (up). The gripper is commanded in the first row of a phase.
PHASES = ("approach",) * 4 + ("grasp",) * 2 + ("move",) * 4 + ("release",) * 2 + ("retreat",) * 3
_STEPS_M = (
    [(0.04, 0.02, 0.0)] * 2 + [(0.0, 0.0, -0.05)] * 2 + [(0, 0, 0)] * 2 + [(0, 0, 0.05)] * 2
    + [(0.0, -0.06, 0.0)] * 2 + [(0, 0, 0)] * 2 + [(0, 0, 0.05)] * 3
)  # fmt: skip


def named(key: str, number: int, stored_steps: int = 5) -> EpisodeName:
    """An episode of a dataset of the name "small"."""
    return EpisodeName(
        key=key, number=number, dataset="small", split="train", stored_steps=stored_steps
    )


def episode_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Actions float32[15, 7] and states float32[15, 8]."""
    moves = np.array(_STEPS_M, np.float32)
    actions = np.zeros((len(PHASES), 7), np.float32)
    actions[:, :3] = moves
    actions[:, 6] = [phase not in ("grasp", "move") for phase in PHASES]
    states = np.zeros((len(PHASES), 8), np.float32)
    states[:, :3] = np.cumsum(moves, axis=0) - moves + (0.3, 0.0, 0.2)
    return actions, states


def write_small_index(
    folder: Path,
    *,
    instructions: tuple[str, ...] = ("put the spoon on the towel",) * 3,
    keys: tuple[str, ...] = (),
    seed: int = 0,
    spec: DatasetSpec = SPEC,
) -> Index:
    """An index of one episode for each instruction; stored step 0 is no row."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    stored = len(PHASES) + 1
    data, entries = b"", []
    for number, instruction in enumerate(instructions):
        actions, states = episode_arrays()
        frames = np.zeros(stored, ENCODED)
        for step in range(stored):
            jpeg = encode(random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
            frames[step] = (0, len(data), len(jpeg), google_crc32c.value(jpeg))
            data += jpeg
        entries.append(
            EpisodeEntry(
                key=keys[number] if keys else f"episode_{number}",
                file=0,
                record=number,
                success=None,
                actions=actions,
                states=states,
                frame=np.arange(1, stored),
                next_frame=np.minimum(np.arange(1, stored) + 1, stored - 1),
                instructions=(instruction,) * len(PHASES),
                annotations=(),
                flags=np.zeros(len(PHASES), np.uint8),
                frames={"image": frames},
                stored_steps=stored,
            )
        )
    (folder / "images").write_bytes(data)
    header = Header(
        dataset="small",
        version="1.0.0",
        split="train",
        source=str(folder),
        spec=spec,
        cameras={"image": Camera(kind="encoded", height=HEIGHT, width=WIDTH)},
        files=(SourceFile(path="images", size=len(data)),),
    )
    return write_index(folder / "index", header, entries)
