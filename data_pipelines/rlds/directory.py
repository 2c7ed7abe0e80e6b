"""A TFDS version directory, read without TensorFlow: what it says about itself, and its records by
number.

    bridge_dataset/1.0.0/
      dataset_info.json     name, file format, splits with the number of records in each shard
      features.json         the tree of features: class, shape, dtype
      bridge_dataset-train.tfrecord-00000-of-00001      one record = one episode

A record is a `tf.train.Example`, a flat table of lists. TFDS writes a nested feature under its path
joined by "/", and a feature of the episode's steps as one list with the values of all steps one
after the other::

    "episode_metadata/file_path"        bytes_list, 1 value
    "steps/action"                      float_list, T * 7 values
    "steps/observation/image_0"         bytes_list, T encoded images

Feature keys in this project are these flat paths. The directory may be a local one or a URL.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines import storage
from data_pipelines.rlds.tfrecord import TFRecordFile

STEPS = "steps"
# Types stored by value: floats as float_list, in 32 bits, the others as int64_list.
FLOATS = frozenset({"float16", "float32", "float64"})
INTEGERS = frozenset({"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"})
INFO, FEATURES = "dataset_info.json", "features.json"
DEFAULT_FILE_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One entry of features.json.

    Attributes:
      key: the flat path, such as "steps/observation/state".
      kind: "tensor", "image", "text", or the TFDS class's own name where it is none of these.
      shape: shape of one value (of one step for a step feature); None where it varies.
      dtype: NumPy's name of the type, such as "float32"; "string" for text.
      per_step: True below "steps".
    """

    key: str
    kind: str
    shape: tuple[int | None, ...] = ()
    dtype: str = "string"
    per_step: bool = False


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split as dataset_info.json describes it: its files and the number of records in each."""

    name: str
    files: tuple[Path | str, ...]
    shard_lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Directory:
    """A TFDS version directory. `Directory.read(path)` makes one.

    Attributes:
      path: the version directory; a Path where it is local, a URL elsewhere.
      name: the dataset's name, such as "bridge_dataset".
      version: such as "1.0.0".
      splits: by name.
      features: by flat key.
    """

    path: Path | str
    name: str
    version: str
    splits: Mapping[str, Split]
    features: Mapping[str, Feature]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Directory":
        """Reads dataset_info.json and features.json; opens no record file.

        Raises:
          FileNotFoundError: `path` is no TFDS version directory.
          ValueError: a file is malformed, or the records are not TFRecords.
        """
        path = storage.locate(path)
        if not storage.exists(_file(path, INFO)):
            versions = sorted(str(found.parent) for found in _local_versions(path))
            hint = f"; did you mean {' or '.join(versions)}?" if versions else ""
            raise FileNotFoundError(
                f"{path} is no TFDS version directory: it has no dataset_info.json{hint}"
            )
        info = _read_json(_file(path, INFO))
        file_format = info.get("fileFormat", "tfrecord")
        if file_format != "tfrecord":
            raise ValueError(f"{path}: the file format is {file_format!r}; only 'tfrecord' is read")
        for field in ("name", "splits"):
            if field not in info:
                raise ValueError(f"{_file(path, INFO)} has no field {field!r}")
        splits = (_split(path, info["name"], entry) for entry in info["splits"])
        features = _features(_read_json(_file(path, FEATURES)), key="", per_step=False)
        return cls(
            path=path,
            name=info["name"],
            version=info.get("version", ""),
            splits={split.name: split for split in splits},
            features={feature.key: feature for feature in features},
        )

    def feature(self, key: str) -> Feature:
        """The feature with this flat key; a ValueError lists all keys where there is none."""
        if key not in self.features:
            raise ValueError(
                f"{_file(self.path, FEATURES)} has no feature {key!r}; it has: "
                f"{', '.join(sorted(self.features))}"
            )
        return self.features[key]

    def split(self, name: str) -> Split:
        """The split of this name; a ValueError lists all splits where there is none."""
        if name not in self.splits:
            raise ValueError(
                f"{self.path} has no split {name!r}; it has: {', '.join(sorted(self.splits))}"
            )
        return self.splits[name]

    def sizes(self, split: str) -> tuple[int, ...]:
        """Bytes of each of a split's files; a FileNotFoundError names the first that is missing."""
        files = self.split(split).files
        sizes = storage.sizes(self.path, [os.path.basename(file) for file in files])
        for file, size in zip(files, sizes, strict=True):
            if size is None:
                raise FileNotFoundError(
                    f"{file} is missing; dataset_info.json lists {len(files)} file(s) "
                    f"in split {split!r}"
                )
        return tuple(size for size in sizes if size is not None)

    def open_split(self, name: str) -> tuple[TFRecordFile, ...]:
        """The split's files, each scanned and holding the number of records that it should.

        Raises:
          FileNotFoundError: a file is missing.
          ValueError: there is no such split, or a file is truncated, corrupt or has another number
            of records.
        """
        self.sizes(name)
        split = self.split(name)
        shards = []
        for path, length in zip(split.files, split.shard_lengths, strict=True):
            shard = TFRecordFile(path)
            if len(shard) != length:
                raise ValueError(
                    f"{path} has {len(shard)} records; dataset_info.json says {length}"
                )
            shards.append(shard)
        return tuple(shards)

    def parse(self, shard: TFRecordFile, record: int) -> "Example":
        """Reads and parses one record."""
        where = shard.where(record)
        try:
            example = tf_example_pb2.Example.FromString(shard.read(record))
        except DecodeError as error:
            raise ValueError(f"{where}: not a tf.train.Example ({error})") from error
        return Example(directory=self, where=where, lists=example.features.feature)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A parsed record: features by flat key, checked against features.json as they are asked for.

    Attributes:
      directory: where it comes from.
      where: names the record in messages.
      lists: the `tf.train.Example`'s features.
    """

    directory: Directory
    where: str
    lists: Mapping[str, Any]

    def array(self, key: str) -> np.ndarray:
        """A numeric feature: dtype[T, *shape] below "steps", dtype[*shape] elsewhere.

        Raises:
          ValueError: the feature is missing, is not numeric, or its size is no multiple of its
            shape.
        """
        feature = self.directory.feature(key)
        if feature.kind != "tensor" or feature.dtype not in FLOATS | INTEGERS:
            raise ValueError(
                f"{self.where}: feature {key!r} is {feature.kind} of {feature.dtype}, not a number"
            )
        kind = "float_list" if feature.dtype in FLOATS else "int64_list"
        values = np.array(self._list(feature, kind), feature.dtype)
        shape = [size for size in feature.shape if size is not None]
        size = math.prod(shape)
        if len(shape) < len(feature.shape) or values.size % max(size, 1):
            raise ValueError(
                f"{self.where}: feature {key!r} has {values.size} values; "
                f"its shape is {feature.shape}"
            )
        if not feature.per_step and values.size != size:
            raise ValueError(f"{self.where}: feature {key!r} has {values.size} values, not {size}")
        return values.reshape([-1, *shape] if feature.per_step else shape)

    def encoded(self, key: str) -> list[bytes]:
        """The byte strings of an image or text feature: one a step, or one outside "steps"."""
        feature = self.directory.feature(key)
        if feature.kind not in ("image", "text") and feature.dtype not in ("string", "object"):
            raise ValueError(
                f"{self.where}: feature {key!r} is {feature.kind} of {feature.dtype}, "
                f"neither image nor text"
            )
        return list(self._list(feature, "bytes_list"))

    def text(self, key: str) -> list[str]:
        """The strings of a text feature: one a step, or one outside "steps"."""
        try:
            return [value.decode("utf-8") for value in self.encoded(key)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where}: feature {key!r} is not UTF-8 ({error})") from error

    def _list(self, feature: Feature, kind: str) -> Any:
        """The feature's values as stored, or an error that lists what the record holds."""
        # Asking a protobuf map for a missing key would add it.
        if feature.key not in self.lists:
            raise ValueError(
                f"{self.where}: feature {feature.key!r} is missing; the record has: "
                f"{', '.join(sorted(self.lists))}"
            )
        stored = self.lists[feature.key]
        found = stored.WhichOneof("kind")
        if found != kind:
            raise ValueError(
                f"{self.where}: feature {feature.key!r} is stored as {found}; "
                f"features.json means {kind}"
            )
        return getattr(stored, kind).value


def _file(path: Path | str, name: str) -> Path | str:
    """A file of the directory, as the directory: a Path or a URL."""
    return path / name if isinstance(path, Path) else storage.join(path, name)


def _local_versions(path: Path | str) -> list[Path]:
    """dataset_info.json of the versions below a local folder that is none itself."""
    return list(path.glob(f"*/{INFO}")) if isinstance(path, Path) else []


def _read_json(path: Path | str) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(storage.read_text(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing; a TFDS version directory has one") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _split(path: Path | str, dataset: str, entry: Mapping[str, Any]) -> Split:
    """One entry of dataset_info.json's "splits"; its numbers are strings there."""
    lengths = tuple(int(length) for length in entry.get("shardLengths", ()))
    digits = max(5, len(str(len(lengths))))
    template = entry.get("filepathTemplate") or DEFAULT_FILE_TEMPLATE

    def file(shard: int) -> Path | str:
        index, count = f"{shard:0{digits}d}", f"{len(lengths):0{digits}d}"
        fields = {"DATASET": dataset, "SPLIT": entry["name"], "FILEFORMAT": "tfrecord"}
        fields |= {"SHARD_INDEX": index, "NUM_SHARDS": count}
        fields["SHARD_X_OF_Y"] = f"{index}-of-{count}"
        try:
            return _file(path, template.format(**fields))
        except KeyError as error:
            raise ValueError(
                f"{_file(path, INFO)}: unknown field {error} in the file template {template!r}"
            ) from error

    files = tuple(file(shard) for shard in range(len(lengths)))
    return Split(name=entry["name"], files=files, shard_lengths=lengths)


def _features(node: Mapping[str, Any], *, key: str, per_step: bool) -> Iterator[Feature]:
    """Walks the tree of features.json."""
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            yield from _features(child, key=f"{key}/{name}" if key else name, per_step=per_step)
    elif "sequence" in node and key == STEPS:
        yield from _features(node["sequence"]["feature"], key=key, per_step=True)
    elif "tensor" in node or "image" in node:
        kind = "tensor" if "tensor" in node else "image"
        sizes = (int(size) for size in node[kind].get("shape", {}).get("dimensions", ()))
        # An encoded tensor (zlib, raw bytes) is one byte string, which `array` must not misread.
        encoding = node[kind].get("encoding", "none")
        yield Feature(
            key=key,
            kind=kind if encoding == "none" else f"{kind} encoded by {encoding}",
            shape=tuple(size if size >= 0 else None for size in sizes),
            dtype=node[kind].get("dtype", "uint8"),
            per_step=per_step,
        )
    elif "text" in node:
        yield Feature(key=key, kind="text", per_step=per_step)
    else:
        kind = node.get("pythonClassName", "unknown").rsplit(".", 1)[-1]
        yield Feature(key=key, kind=kind, dtype="unknown", per_step=per_step)
