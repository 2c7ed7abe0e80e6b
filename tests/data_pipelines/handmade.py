"""Writes small TFDS version directories by hand, byte for byte as TFDS lays them out, for tests."""

import io
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import simplejpeg
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

Record = Mapping[str, Any]

_FEATURES = "tensorflow_datasets.core.features."


def masked(data: bytes) -> bytes:
    """The masked CRC-32C of `data` as four bytes."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def frame(payload: bytes) -> bytes:
    """A payload as a TFRecord."""
    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def example(record: Record) -> bytes:
    """A serialised tf.train.Example of flat lists, their kind taken from the values."""
    proto = tf_example_pb2.Example()
    for key, values in record.items():
        feature = proto.features.feature[key]
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            feature.float_list.value.extend(values.ravel().tolist())
        elif isinstance(values, np.ndarray):
            feature.int64_list.value.extend(int(x) for x in values.ravel())
        else:
            feature.bytes_list.value.extend(values)
    return proto.SerializeToString()


def tensor(*shape: int, dtype: str = "float32") -> dict[str, Any]:
    dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {
        "pythonClassName": _FEATURES + ("tensor_feature.Tensor" if shape else "scalar.Scalar"),
        "tensor": {"shape": dimensions, "dtype": dtype, "encoding": "none"},
    }


def image(height: int, width: int, encoding: str = "jpeg") -> dict[str, Any]:
    return {
        "pythonClassName": _FEATURES + "image_feature.Image",
        "image": {
            "shape": {"dimensions": [str(height), str(width), "3"]},
            "dtype": "uint8",
            "encodingFormat": encoding,
        },
    }


def text() -> dict[str, Any]:
    return {"pythonClassName": _FEATURES + "text_feature.Text", "text": {}}


def features_json(features: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """features.json for flat keys: what lies below "steps/" becomes the steps' Dataset feature."""
    tree: dict[str, Any] = {}
    for key, feature in features.items():
        *folders, leaf = key.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = feature

    def build(node: dict[str, Any], key: str) -> dict[str, Any]:
        if "pythonClassName" in node:
            return node
        children = {name: build(child, f"{key}/{name}") for name, child in node.items()}
        built = {
            "pythonClassName": _FEATURES + "features_dict.FeaturesDict",
            "featuresDict": {"features": children},
        }
        if key != "/steps":
            return built
        return {
            "pythonClassName": _FEATURES + "dataset_feature.Dataset",
            "sequence": {"feature": built, "length": "-1"},
        }

    return build(tree, "")


def write_directory(
    path: Path,
    name: str,
    features: Mapping[str, dict[str, Any]],
    splits: Mapping[str, Sequence[Sequence[Record]]],
) -> Path:
    """A TFDS version directory; `splits` gives, per split, the records of each shard."""
    path.mkdir(parents=True)
    infos = []
    for split, shards in splits.items():
        payloads = [[example(record) for record in shard] for shard in shards]
        infos.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(len(payload) for shard in payloads for payload in shard)),
                "shardLengths": [str(len(shard)) for shard in payloads],
            }
        )
        for number, shard in enumerate(payloads):
            file = path / f"{name}-{split}.tfrecord-{number:05d}-of-{len(payloads):05d}"
            file.write_bytes(b"".join(frame(payload) for payload in shard))
    info = {"fileFormat": "tfrecord", "name": name, "splits": infos, "version": path.name}
    (path / "dataset_info.json").write_text(json.dumps(info))
    (path / "features.json").write_text(json.dumps(features_json(features)))
    return path


def encode(pixels: np.ndarray, encoding: str = "jpeg") -> bytes:
    if encoding == "jpeg":
        return simplejpeg.encode_jpeg(pixels, quality=95)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=encoding)
    return buffer.getvalue()


TABLETOP_FEATURES: Mapping[str, dict[str, Any]] = {
    "steps/observation/image": image(16, 24),
    "steps/observation/state": tensor(8),
    "steps/action": tensor(7),
    "steps/language_instruction": text(),
    "steps/is_last": tensor(dtype="bool"),
    "steps/reasoning/subtask": text(),
    "steps/reasoning/boxes": tensor(2, 4),
    "steps/reasoning/motion": text(),
    "episode_metadata/file_path": text(),
    "episode_metadata/success": tensor(dtype="bool"),
}


def tabletop_record(
    seed: int, steps: int, size: tuple[int, int] = (16, 24), encoding: str = "jpeg"
) -> dict[str, Any]:
    """One episode of a lara_tabletop directory with random numbers and noise for images."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (steps, *size, 3), np.uint8)
    actions = random.normal(size=(steps, 7)).astype(np.float32)
    actions[:, 6] = random.integers(0, 2, steps)
    corners = random.uniform(size=(steps, 2, 2, 2)).astype(np.float32)
    boxes = np.sort(corners, axis=2).reshape(steps, 2, 4)
    return {
        "steps/observation/image": [encode(picture, encoding) for picture in pixels],
        "steps/observation/state": random.normal(size=(steps, 8)).astype(np.float32),
        "steps/action": actions,
        "steps/language_instruction": [f"task {seed}".encode()] * steps,
        "steps/is_last": np.arange(steps) == steps - 1,
        "steps/reasoning/subtask": [f"subtask {t}".encode() for t in range(steps)],
        "steps/reasoning/boxes": boxes,
        "steps/reasoning/motion": [f"motion {t}".encode() for t in range(steps)],
        "episode_metadata/file_path": [f"episode_{seed}".encode()],
        "episode_metadata/success": np.array([True]),
    }


def write_tabletop(path: Path, *shards: Sequence[Record]) -> Path:
    """A lara_tabletop directory with the split "train"; by default shards of 2 and 1 episodes."""
    if not shards:
        shards = (
            [tabletop_record(0, 4), tabletop_record(1, 3)],
            [tabletop_record(2, 5)],
        )
    return write_directory(path / "1.0.0", "lara_tabletop", TABLETOP_FEATURES, {"train": shards})
