"""A TFDS version directory, read without TensorFlow: what it says about itself.

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
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines import storage

STEPS = "steps"
T = TypeVar("T")
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
        if isinstance(path, Path) and not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        if not storage.exists(_file(path, INFO)):
            versions = sorted(str(found.parent) for found in _local_versions(path))
            hint = f"; did you mean {' or '.join(versions)}?" if versions else ""
            raise FileNotFoundError(
                f"{path} is no TFDS version directory: it has no dataset_info.json{hint}"
            )
        info = _Json.read(_file(path, INFO))
        file_format = info.field("fileFormat", str, "tfrecord")
        if file_format != "tfrecord":
            raise ValueError(f"{path}: the file format is {file_format!r}; only 'tfrecord' is read")
        name = info.field("name", str)
        splits = (_split(path, name, entry) for entry in info.items("splits"))
        features = _features(_Json.read(_file(path, FEATURES)), key="", per_step=False)
        return cls(
            path=path,
            name=name,
            version=info.field("version", str, ""),
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

    def facts(self, split: str) -> tuple[storage.FileFacts, ...]:
        """Of each of a split's files; a FileNotFoundError names the first that is missing."""
        files = self.split(split).files
        found = storage.facts(self.path, [os.path.basename(file) for file in files])
        for file, facts in zip(files, found, strict=True):
            if facts is None:
                raise FileNotFoundError(
                    f"{file} is missing; dataset_info.json lists {len(files)} file(s) "
                    f"in split {split!r}"
                )
        return tuple(facts for facts in found if facts is not None)


def _file(path: Path | str, name: str) -> Path | str:
    """A file of the directory, as the directory: a Path or a URL."""
    return path / name if isinstance(path, Path) else storage.join(path, name)


def _local_versions(path: Path | str) -> list[Path]:
    """dataset_info.json of the versions below a local folder that is none itself."""
    return list(path.glob(f"*/{INFO}")) if isinstance(path, Path) else []


@dataclass(frozen=True)
class _Json:
    """An object of a JSON file; its fields are checked as they are asked for, null is none.

    Attributes:
      where: names it in messages.
      values: its fields.
    """

    where: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path | str) -> "_Json":
        """The object that a file holds."""
        try:
            value = json.loads(storage.read_text(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{path} is missing; a TFDS version directory has one"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.of(value, str(path))

    @classmethod
    def of(cls, value: Any, where: str) -> "_Json":
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_short(value)}, not a JSON object")
        return cls(where, value)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def field(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A field of one type; without a default it must be there."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.where} has no field {name!r}")
        if not isinstance(value, kind):
            raise ValueError(f"{self.where}: {name!r} is {_short(value)}, not a {kind.__name__}")
        return value

    def object(self, name: str) -> "_Json":
        """A field that is an object."""
        return _Json.of(self.field(name, dict), f"{self.where}, {name!r}")

    def items(self, name: str) -> "Iterator[_Json]":
        """The objects of a field that is a list of them."""
        for number, value in enumerate(self.field(name, list)):
            yield _Json.of(value, f"{self.where}, {name!r}, entry {number}")

    def integers(self, name: str) -> tuple[int, ...]:
        """A field that is a list of whole numbers, written as strings; () where it is missing."""
        values = self.field(name, list, [])
        if not all(re.fullmatch(r"-?\d+", str(value)) for value in values):
            raise ValueError(
                f"{self.where}: {name!r} is {_short(values)}, not a list of whole numbers"
            )
        return tuple(int(value) for value in values)


def _short(value: Any) -> str:
    """A JSON value in a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _split(path: Path | str, dataset: str, entry: _Json) -> Split:
    """One entry of dataset_info.json's "splits"."""
    name, lengths = entry.field("name", str), entry.integers("shardLengths")
    if any(length < 0 for length in lengths):
        raise ValueError(f"{entry.where}: 'shardLengths' are {lengths}; they must be at least 0")
    digits = max(5, len(str(len(lengths))))
    template = entry.field("filepathTemplate", str, "") or DEFAULT_FILE_TEMPLATE

    def file(shard: int) -> Path | str:
        index, count = f"{shard:0{digits}d}", f"{len(lengths):0{digits}d}"
        fields = {"DATASET": dataset, "SPLIT": name, "FILEFORMAT": "tfrecord"}
        fields |= {"SHARD_INDEX": index, "NUM_SHARDS": count}
        fields["SHARD_X_OF_Y"] = f"{index}-of-{count}"
        try:
            return _file(path, template.format(**fields))
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"{entry.where}: unknown field {error} in the file template {template!r}"
            ) from error

    files = tuple(file(shard) for shard in range(len(lengths)))
    return Split(name=name, files=files, shard_lengths=lengths)


def _features(node: _Json, *, key: str, per_step: bool) -> Iterator[Feature]:
    """Walks the tree of features.json."""
    if "featuresDict" in node:
        children = node.object("featuresDict").object("features")
        for name in children.values:
            below = f"{key}/{name}" if key else name
            yield from _features(children.object(name), key=below, per_step=per_step)
    elif "sequence" in node and key == STEPS:
        steps = node.object("sequence").object("feature")
        yield from _features(steps, key=key, per_step=True)
    elif "tensor" in node or "image" in node:
        kind = "tensor" if "tensor" in node else "image"
        leaf = node.object(kind)
        sizes = leaf.object("shape").integers("dimensions") if "shape" in leaf else ()
        # An encoded tensor (zlib, raw bytes) is one byte string, which `array` must not misread.
        encoding = leaf.field("encoding", str, "none")
        yield Feature(
            key=key,
            kind=kind if encoding == "none" else f"{kind} encoded by {encoding}",
            shape=tuple(size if size >= 0 else None for size in sizes),
            dtype=leaf.field("dtype", str, "uint8"),
            per_step=per_step,
        )
    elif "text" in node:
        yield Feature(key=key, kind="text", per_step=per_step)
    else:
        kind = node.field("pythonClassName", str, "unknown").rsplit(".", 1)[-1]
        yield Feature(key=key, kind=kind, dtype="unknown", per_step=per_step)
