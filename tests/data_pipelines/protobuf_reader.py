"""RLDS records through protobuf: plain, slow, and what the zero-copy reader is compared with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.rlds.directory import FLOATS, INTEGERS, Directory, Feature
from data_pipelines.rlds.tfrecord import Record, read_records, where_record


def read_split(directory: Directory, name: str) -> list["Example"]:
    """The parsed records of a split, in order.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: there is no such split, a record is no `tf.train.Example`, or a file is truncated,
        corrupt or has another number of records.
    """
    directory.facts(name)
    split = directory.split(name)
    examples = []
    for path, length in zip(split.files, split.shard_lengths, strict=True):
        records = list(read_records(path))
        if len(records) != length:
            raise ValueError(f"{path} has {len(records)} records; dataset_info.json says {length}")
        examples += [_parse(directory, path, record) for record in records]
    return examples


def _parse(directory: Directory, path: str | Path, record: Record) -> "Example":
    where = where_record(path, record.number)
    try:
        example = tf_example_pb2.Example.FromString(record.payload)
    except DecodeError as error:
        raise ValueError(f"{where}: not a tf.train.Example ({error})") from error
    return Example(
        directory=directory, where=where, payload=record.payload, lists=example.features.feature
    )


@dataclass(frozen=True, kw_only=True)
class Example:
    """A parsed record: features by flat key, checked against features.json as they are asked for.

    Attributes:
      directory: where it comes from.
      where: names the record in messages.
      payload: its bytes.
      lists: the `tf.train.Example`'s features.
    """

    directory: Directory
    where: str
    payload: bytes
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
