"""Small indexes made by hand: a few episodes of tiny JPEGs in one file, and tokens for prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg

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
from lara_jax.transforms import Normalizer, Statistics

PREFIX, SUFFIX = 6, 4


def spec(name: str, *, action_dim: int = 7, state_dim: int = 8, **changes: Any) -> DatasetSpec:
    """A dataset whose last action dimension is a position to hold."""
    settings: dict[str, Any] = {
        "name": name,
        "control_hz": 5.0,
        "cameras": {"image": "observation/image"},
        "roles": {"primary": "image"},
        "action": ("action",),
        "action_encoding": "EEF_POS" if action_dim == 7 else "JOINT_POS",
        "state": ("observation/state",),
        "absolute_action": (False,) * (action_dim - 1) + (True,),
        "action_modes": ("q99",) * (action_dim - 1) + ("none",),
        "state_modes": ("q99",) * state_dim,
    }
    return DatasetSpec(**settings | changes)


def jpeg(*seed: int, size: tuple[int, int] = (16, 24)) -> bytes:
    """A picture that differs with the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")


def decoded(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=True)


def make_index(
    folder: Path,
    name: str = "alpha",
    episodes: Sequence[int] = (4, 3, 5),
    *,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    picture: Callable[..., bytes] = jpeg,
    flags: Sequence[int] | None = None,
    dropped: int = 0,
    annotated: bool = False,
    **changes: Any,
) -> Index:
    """An index of its own file of frames.

    Args:
      folder: gets the file and the index.
      name: of the dataset.
      episodes: number of rows of each.
      sizes: (height, width) by camera.
      picture: (camera, episode, step, size=) -> an encoded frame.
      flags: of all rows.
      dropped: stored steps at the start of each episode that are no rows.
      annotated: whether the rows have subtasks and boxes.
      changes: to the spec.
    """
    sizes = dict(sizes or {"image": (16, 24)})
    cameras = {camera: f"observation/{camera}" for camera in sizes}
    definition = spec(name, **{"cameras": cameras} | changes)
    data, entries, row = bytearray(), [], 0
    for number, rows in enumerate(episodes):
        stored = rows + dropped
        places = {camera: np.zeros(stored, ENCODED) for camera in sizes}
        for step in range(stored):
            for c, (camera, size) in enumerate(sizes.items()):
                frame = picture(c, number, step, size=size)
                crc = google_crc32c.value(frame)
                places[camera][step] = (0, len(data), len(frame), crc)
                data += frame
        every = np.arange(row, row + rows)
        steps = np.arange(dropped, stored)
        entries.append(
            EpisodeEntry(
                key=f"episode {number}",
                file=0,
                record=number,
                success=None,
                actions=numbers(every, definition.action_dim),
                states=-numbers(every, definition.state_dim),
                frame=steps.astype(np.int32),
                next_frame=np.minimum(steps + 1, stored - 1).astype(np.int32),
                instructions=[f"{name} {number}"] * rows,
                annotations=[
                    Annotation(f"task {r}", ((0.0, 0.0, 0.5, 1.0),)) for r in every.tolist()
                ]
                if annotated
                else (),
                flags=np.array(flags or [0] * sum(episodes), np.uint8)[row : row + rows],
                frames=places,
                stored_steps=stored,
            )
        )
        row += rows
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "frames.bin").write_bytes(data)
    header = Header(
        dataset=name,
        version="1.0.0",
        split="train",
        source=str(folder),
        spec=definition,
        cameras={k: Camera(kind="encoded", height=h, width=w) for k, (h, w) in sizes.items()},
        files=(SourceFile(path="frames.bin", size=len(data)),),
    )
    return write_index(folder / "index", header, entries)


def numbers(rows: np.ndarray, width: int) -> np.ndarray:
    """Rows 1, 2 -> [[1.0, 1.01, ...], [2.0, 2.01, ...]], float32."""
    return (rows[:, None] + np.arange(width) / 100).astype(np.float32)


def normalizers(*indexes: Index) -> dict[str, tuple[Normalizer, Normalizer]]:
    """Some that fit, for each dataset."""
    found = {}
    for index in indexes:
        pair = []
        for values, modes in (
            (index.actions, index.spec.action_modes),
            (index.states, index.spec.state_modes),
        ):
            low, high = tuple(values.min(0).tolist()), tuple(values.max(0).tolist())
            zero = (0.0,) * len(low)
            one = (1.0,) * len(low)
            statistics = Statistics(min=low, max=high, mean=zero, std=one, q01=low, q99=high)
            pair.append(Normalizer(modes=modes, statistics=statistics))
        found[index.header.dataset] = (pair[0], pair[1])
    return found


def prompt(instruction: str, annotation: Annotation | None) -> dict[str, np.ndarray]:
    """Letters for tokens."""
    words = annotation.subtask if annotation else ""
    prefix = np.frombuffer(instruction[-PREFIX:].rjust(PREFIX).encode(), np.uint8)
    suffix = np.frombuffer(words[-SUFFIX:].ljust(SUFFIX).encode(), np.uint8)
    return {
        "prefix_ids": prefix.astype(np.int32),
        "prefix_mask": prefix != ord(" "),
        "suffix_ids": suffix.astype(np.int32),
        "suffix_mask": suffix != ord(" "),
        "loss_mask": suffix != ord(" "),
    }
