"""A made-up dataset in the Bridge release's schema: TFRecords to measure on, equal everywhere.

Frames are 256 x 256 JPEGs, quality 95, 4:2:0, as in the release: windows that wander over pictures
whose spectrum falls like a photograph's, under a sensor's noise. Both are chosen such that a frame
takes about 22 kB and decodes as fast as stills of that camera do. Two of the four cameras are
blank, as they often are there.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from data_pipelines.rlds.directory import Feature
from data_pipelines.rlds.writer import write_dataset

NAME, VERSION = "bridge_dataset", "1.0.0"
SIZE_PX = 256
CAMERAS = ("image_0", "image_1", "image_2", "image_3")
SEEN = CAMERAS[:2]
STEPS = (25, 50)  # of an episode: at least, below
PICTURES, PICTURE_PX = 12, 512
NOISE_LEVELS = 1.0
TASKS = ("put the carrot on the plate", "put the spoon on the towel", "close the drawer", "")

Values = Mapping[str, np.ndarray | Sequence[bytes]]


def open_or_write(root: Path, episodes: int) -> Path:
    """The dataset's version directory under `root`; written if it is not there."""
    path = root / NAME / VERSION
    if not (path / "dataset_info.json").is_file():
        write_dataset(
            root,
            name=NAME,
            version=VERSION,
            description="Made up, in the schema of Bridge V2, for measurements.",
            features=features(),
            splits={"train": _episodes(episodes)},
        )
    return path


def features() -> tuple[Feature, ...]:
    """The schema."""

    def step(key: str, kind: str = "tensor", shape: tuple[int, ...] = (), dtype: str = "float32"):
        return Feature(key=f"steps/{key}", kind=kind, shape=shape, dtype=dtype, per_step=True)

    return (
        *(step(f"observation/{c}", "image", (SIZE_PX, SIZE_PX, 3), "uint8") for c in CAMERAS),
        step("observation/state", shape=(7,)),
        step("action", shape=(7,)),
        step("language_instruction", "text", dtype="string"),
        step("language_embedding", shape=(512,)),
        *(step(f"is_{which}", dtype="bool") for which in ("first", "last", "terminal")),
        step("discount"),
        step("reward"),
        Feature(key="episode_metadata/file_path", kind="text"),
        Feature(key="episode_metadata/episode_id", kind="tensor", dtype="int32"),
    )


def _episodes(count: int) -> Iterator[bytes]:
    """Serialised episodes."""
    random = np.random.default_rng(0)
    pictures = [_picture(random) for _ in range(PICTURES)]
    noise = random.normal(0, NOISE_LEVELS, (PICTURE_PX, PICTURE_PX, 3)).astype(np.float32)
    blank = _jpeg(np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8))
    for number in tqdm(range(count), desc="writing episodes", delay=1):
        steps = int(random.integers(*STEPS))
        images: dict[str, list[bytes]] = {camera: [blank] * steps for camera in CAMERAS}
        for camera in SEEN:
            images[camera] = _walk(pictures[random.integers(PICTURES)], noise, random, steps)
        yield _example(_values(number, steps, images, random))


def _values(
    number: int, steps: int, images: Mapping[str, Sequence[bytes]], random: np.random.Generator
) -> Values:
    """An episode's features by flat key."""
    moves = random.normal(0, 0.01, (steps, 7)).astype(np.float32)
    state = np.cumsum(moves, axis=0)
    moves[:, 6] = state[:, 6] = random.integers(0, 2, steps)
    task = TASKS[number % len(TASKS)].encode()
    first, last = np.arange(steps) == 0, np.arange(steps) == steps - 1
    return {
        **{f"steps/observation/{camera}": jpegs for camera, jpegs in images.items()},
        "steps/observation/state": state,
        "steps/action": moves,
        "steps/language_instruction": [task] * steps,
        "steps/language_embedding": np.zeros((steps, 512), np.float32),
        "steps/is_first": first,
        "steps/is_last": last,
        "steps/is_terminal": last,
        "steps/discount": np.ones(steps, np.float32),
        "steps/reward": last.astype(np.float32),
        "episode_metadata/file_path": [f"/made/up/{number}/out.npy".encode()],
        "episode_metadata/episode_id": np.array([number]),
    }


def _picture(random: np.random.Generator) -> np.ndarray:
    """A picture whose details fade as in a photograph: float32[Y, X, 3] in 0..255."""

    def plane(power: float, deviation: float) -> np.ndarray:
        rows, columns = np.fft.fftfreq(PICTURE_PX)[:, None], np.fft.rfftfreq(PICTURE_PX)[None, :]
        frequency = np.maximum(np.hypot(rows, columns), 1 / PICTURE_PX)
        phases = random.uniform(0, 2 * np.pi, frequency.shape)
        values = np.fft.irfft2(np.exp(1j * phases) / frequency**power)
        return (values - values.mean()) * (deviation / values.std())

    colours = np.stack([plane(1.8, 10) for _ in range(3)], axis=-1)
    return np.clip(120 + plane(1.6, 50)[..., None] + colours, 0, 255).astype(np.float32)


def _walk(
    picture: np.ndarray, noise: np.ndarray, random: np.random.Generator, steps: int
) -> list[bytes]:
    """JPEGs of a window that wanders over a picture."""
    room = PICTURE_PX - SIZE_PX
    places = random.integers(0, room, 2) + np.cumsum(random.integers(-3, 4, (steps, 2)), axis=0)
    jpegs = []
    for top, left in np.clip(places, 0, room):
        y, x = random.integers(0, room, 2)
        seen = picture[top : top + SIZE_PX, left : left + SIZE_PX]
        frame = np.rint(seen + noise[y : y + SIZE_PX, x : x + SIZE_PX])
        jpegs.append(_jpeg(np.clip(frame, 0, 255).astype(np.uint8)))
    return jpegs


def _jpeg(frame: np.ndarray) -> bytes:
    return bytes(simplejpeg.encode_jpeg(frame, quality=95, colorsubsampling="420"))


def _example(values: Values) -> bytes:
    """A tf.train.Example."""
    example: Any = tf_example_pb2.Example()
    for key, value in values.items():
        entry = example.features.feature[key]
        if not isinstance(value, np.ndarray):
            entry.bytes_list.value.extend(value)
        elif value.dtype.kind == "f":
            entry.float_list.value.extend(value.ravel().tolist())
        else:
            entry.int64_list.value.extend(value.ravel().astype(np.int64).tolist())
    return bytes(example.SerializeToString(deterministic=True))
