"""Writes a TFDS version directory without TensorFlow: the mirror image of `directory`.

    encode_episode(features, values) -> bytes         one episode as a tf.train.Example
    write_dataset(root, name, ..., splits) -> Path    root/name/version, complete

Equal episodes give equal bytes: features are sorted, JPEG encoding is deterministic, and no date or
host is stored. The directory appears at once when it is complete: it is written under another name
beside its place, then renamed.
"""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.rlds.directory import FLOATS, INTEGERS, STEPS, Feature
from data_pipelines.rlds.tfrecord import masked_crc

JPEG_QUALITY = 95
JPEG_SUBSAMPLING = "444"  # small images of small coloured things: do not blur their colours
EPISODES_PER_SHARD = 500
_TFDS = "tensorflow_datasets.core.features"


def encode_episode(features: Sequence[Feature], values: Mapping[str, Any]) -> bytes:
    """Serialises one episode.

    Args:
      features: what an episode consists of; kinds "tensor" (numbers), "image" (uint8, stored as
        JPEG) and "text".
      values: by the features' flat keys; the value, or for a step feature a sequence of T values.

    Returns:
      A `tf.train.Example`.

    Raises:
      ValueError: a value is missing, unknown, or has another shape or length than its feature says.
    """
    keys = {feature.key for feature in features}
    if keys != set(values):
        raise ValueError(
            f"an episode lacks the features {sorted(keys - set(values))} "
            f"and has the unknown {sorted(set(values) - keys)}"
        )
    lengths = {feature.key: len(values[feature.key]) for feature in features if feature.per_step}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"step features must have the same number of steps, at least 1: {lengths}")
    example = tf_example_pb2.Example()
    for feature in features:
        value = values[feature.key]
        rows = value if feature.per_step else [value]
        _fill(example.features.feature[feature.key], feature, rows)
    return bytes(example.SerializeToString(deterministic=True))


def write_dataset(
    root: str | os.PathLike[str],
    *,
    name: str,
    version: str,
    description: str,
    features: Sequence[Feature],
    splits: Mapping[str, Iterable[bytes]],
    overwrite: bool = False,
) -> Path:
    """Writes all splits of a dataset.

    Args:
      root: the directory that holds datasets; made if need be.
      name, version, description: the dataset's.
      features: its schema, as for `encode_episode`.
      splits: by name, the serialised episodes in order; each iterable is read once.
      overwrite: replace a dataset of this name and version.

    Returns:
      The version directory, root/name/version.

    Raises:
      ValueError: the directory exists and `overwrite` is False, or a split is empty.
    """
    final = Path(root) / name / version
    if final.exists() and not overwrite:
        raise ValueError(f"{final} exists; choose another place or allow to overwrite it")
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{version}.") as temporary:
        partial = Path(temporary) / version
        partial.mkdir()
        entries = [
            _write_split(partial, name, split, episodes) for split, episodes in splits.items()
        ]
        files = description_files(name, version, description, features, entries)
        for file, text in files.items():
            (partial / file).write_text(text, encoding="utf-8")
        if final.exists():
            shutil.move(final, Path(temporary) / "replaced")
        os.replace(partial, final)
    return final


def description_files(
    name: str,
    version: str,
    description: str,
    features: Sequence[Feature],
    splits: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """The text of each JSON file of a version directory, by the file's name.

    Args:
      name, version, description, features: as for `write_dataset`.
      splits: a `split_entry` each.
    """
    info = {
        "description": description,
        "fileFormat": "tfrecord",
        "name": name,
        "splits": list(splits),
        "version": version,
    }
    files = {"dataset_info.json": info, "features.json": features_tree(features)}
    return {
        file: json.dumps(value, indent=2, sort_keys=True) + "\n" for file, value in files.items()
    }


def split_entry(split: str, lengths: Sequence[int], payload_bytes: int) -> dict[str, Any]:
    """A split as dataset_info.json has it: the number of records of each shard, and all bytes."""
    return {
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "name": split,
        "numBytes": str(payload_bytes),
        "shardLengths": [str(length) for length in lengths],
    }


def shard_name(dataset: str, split: str, shard: int, shards: int) -> str:
    """The file name of a shard."""
    return f"{dataset}-{split}.tfrecord-{shard:05d}-of-{shards:05d}"


def features_tree(features: Sequence[Feature]) -> dict[str, Any]:
    """features.json: the flat features as TFDS's nested description.

    Raises:
      ValueError: a kind or dtype that this writer does not know.
    """
    outside = {feature.key: _leaf(feature) for feature in features if not feature.per_step}
    prefix = f"{STEPS}/"
    steps = {
        feature.key.removeprefix(prefix): _leaf(feature) for feature in features if feature.per_step
    }
    tree = _nest(outside)
    tree["featuresDict"]["features"][STEPS] = {
        "pythonClassName": f"{_TFDS}.dataset_feature.Dataset",
        "sequence": {"feature": _nest(steps), "length": "-1"},
    }
    return tree


def _fill(stored: Any, feature: Feature, rows: Sequence[Any]) -> None:
    """Puts the values of all steps into one entry of the Example."""
    if feature.kind == "text":
        stored.bytes_list.value.extend(row.encode("utf-8") for row in rows)
        return
    array = np.asarray(rows, feature.dtype)
    if array.shape[1:] != feature.shape:
        raise ValueError(
            f"feature {feature.key!r} has shape {feature.shape}, got {array.shape[1:]}"
        )
    if feature.kind == "image":
        stored.bytes_list.value.extend(_jpeg(image) for image in array)
    elif feature.dtype in FLOATS:
        stored.float_list.value.extend(array.ravel().tolist())
    else:
        stored.int64_list.value.extend(array.ravel().astype(np.int64).tolist())


def _jpeg(image: np.ndarray) -> bytes:
    contiguous = np.ascontiguousarray(image)
    return bytes(
        simplejpeg.encode_jpeg(
            contiguous, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling=JPEG_SUBSAMPLING
        )
    )


def _write_split(
    directory: Path, dataset: str, split: str, episodes: Iterable[bytes]
) -> dict[str, Any]:
    """Writes a split's shards; returns its entry for dataset_info.json."""
    lengths: list[int] = []
    payload_bytes = 0
    remaining = iter(episodes)
    for first in remaining:  # one shard a turn
        lengths.append(0)
        with open(directory / f"{split}-{len(lengths) - 1}", "wb") as shard:
            for episode in chain([first], islice(remaining, EPISODES_PER_SHARD - 1)):
                shard.write(record_bytes(episode))
                lengths[-1] += 1
                payload_bytes += len(episode)
    if not lengths:
        raise ValueError(f"split {split!r} of {dataset} has no episode")
    for index in range(len(lengths)):  # the names hold the number of shards, known only now
        file = shard_name(dataset, split, index, len(lengths))
        os.rename(directory / f"{split}-{index}", directory / file)
    return split_entry(split, lengths, payload_bytes)


def record_bytes(payload: bytes) -> bytes:
    """TFRecord framing of one payload (format: `tfrecord`)."""
    length = struct.pack("<Q", len(payload))
    header = length + struct.pack("<I", masked_crc(length))
    return header + payload + struct.pack("<I", masked_crc(payload))


def _leaf(feature: Feature) -> dict[str, Any]:
    """TFDS's description of one feature."""
    shape: dict[str, Any] = {}
    if feature.shape:
        shape = {"dimensions": [str(size) for size in feature.shape]}
    if feature.kind == "text":
        return {"pythonClassName": f"{_TFDS}.text_feature.Text", "text": {}}
    if feature.kind == "image" and feature.dtype == "uint8":
        image = {"shape": shape, "dtype": "uint8", "encodingFormat": "jpeg"}
        return {"pythonClassName": f"{_TFDS}.image_feature.Image", "image": image}
    if feature.kind == "tensor" and feature.dtype in FLOATS | INTEGERS:
        tensor = {"shape": shape, "dtype": feature.dtype, "encoding": "none"}
        kind = "tensor_feature.Tensor" if feature.shape else "scalar.Scalar"
        return {"pythonClassName": f"{_TFDS}.{kind}", "tensor": tensor}
    raise ValueError(
        f"feature {feature.key!r}: cannot write {feature.kind} of {feature.dtype}; "
        "allowed: text, image of uint8, tensor of numbers"
    )


def _nest(leaves: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A FeaturesDict of leaves by flat key, nested at each "/"."""
    children: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for key, leaf in leaves.items():
        first, _, rest = key.partition("/")
        if rest:
            below.setdefault(first, {})[rest] = leaf
        else:
            children[first] = leaf
    children |= {first: _nest(group) for first, group in below.items()}
    return {
        "pythonClassName": f"{_TFDS}.features_dict.FeaturesDict",
        "featuresDict": {"features": children},
    }
