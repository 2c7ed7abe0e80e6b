"""A LeRobot data set as a TFDS version directory: one shard's conversion, and what says it all.

    shard 0 of the split   ->  NAME-train.tfrecord-00000-of-00012
    shard 1                ->  NAME-train.tfrecord-00001-of-00012
    ...
    all of them            ->  dataset_info.json, features.json, definition.toml

The two JSON files come last: without them the directory is no dataset. definition.toml defines the
dataset for `--definitions`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipelines import storage
from data_pipelines.convert.output import new_file, write_text
from data_pipelines.lerobot.rlds import converted_spec, rlds_episodes, rlds_features
from data_pipelines.lerobot.source import LeRobotSource
from data_pipelines.oxe.registry import REGISTRY
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.rlds.writer import (
    description_files,
    record_bytes,
    shard_name,
    split_entry,
)

DEFINITION_FILE = "definition.toml"


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write.

    Attributes:
      split: of the source.
      shard: its number in the source.
      file: name of the file to write.
    """

    split: str
    shard: int
    file: str


@dataclass(frozen=True, kw_only=True)
class WrittenEpisodes:
    """A shard that was written: its file, its episodes and their bytes."""

    split: str
    file: str
    episodes: int
    payload_bytes: int


def tasks(source: LeRobotSource, name: str) -> list[ShardTask]:
    """The shards of a split that have episodes to convert.

    Args:
      source: the split.
      name: of the dataset to write.
    """
    shards = [
        shard
        for shard, episodes in enumerate(source.shard_episodes)
        if not all(map(source.is_left_out, episodes))
    ]
    return [
        ShardTask(
            split=source.split,
            shard=shard,
            file=shard_name(name, source.split, number, len(shards)),
        )
        for number, shard in enumerate(shards)
    ]


def write_shard(
    sources: Mapping[str, LeRobotSource], folder: str, task: ShardTask
) -> WrittenEpisodes:
    """Writes one shard.

    Args:
      sources: by split.
      folder: the version directory or its URL.
      task: which shard.
    """
    episodes, payload_bytes = 0, 0
    with new_file(storage.join(folder, task.file)) as path, open(path, "wb") as file:
        for payload in rlds_episodes(sources[task.split], task.shard):
            file.write(record_bytes(payload))
            episodes += 1
            payload_bytes += len(payload)
    return WrittenEpisodes(
        split=task.split, file=task.file, episodes=episodes, payload_bytes=payload_bytes
    )


def write_description(
    sources: Mapping[str, LeRobotSource],
    folder: str,
    name: str,
    version: str,
    shards: Sequence[WrittenEpisodes],
) -> None:
    """Writes what makes the files a dataset.

    Args:
      sources: by split, in order.
      folder: the version directory or its URL.
      name, version: of the dataset.
      shards: all that were written, in any order.
    """
    (first, *_) = sources.values()
    entries = []
    for split in sources:
        mine = sorted((s for s in shards if s.split == split), key=lambda shard: shard.file)
        lengths = [shard.episodes for shard in mine]
        entries.append(split_entry(split, lengths, sum(shard.payload_bytes for shard in mine)))
    called = first.source.rpartition("/")[2]
    description = f"Converted from the LeRobot data set {called}."
    features = rlds_features(first)
    files = description_files(name, version, description, features, entries)
    write_text(storage.join(folder, DEFINITION_FILE), definition(converted_spec(first), name))
    for file in ("features.json", "dataset_info.json"):
        write_text(storage.join(folder, file), files[file])


def definition(spec: DatasetSpec, name: str) -> str:
    """A dataset's definition under another name, as a TOML file (`data_pipelines.oxe.registry`)."""
    values = {**spec.to_dict(), "aliases": [], "folders": []}
    del values["name"]
    if name in REGISTRY:
        values["replaces"] = True
    fields = (f"{key} = {_toml(value)}" for key, value in values.items() if value is not None)
    return f"[datasets.{json.dumps(name)}]\n" + "\n".join(fields) + "\n"


def _toml(value: Any) -> str:
    """A TOML value; strings, numbers and lists are written as in JSON."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_pairs(value)) + " }"
    return json.dumps(value, ensure_ascii=False)


def _pairs(values: Mapping[str, Any]) -> Iterator[str]:
    return (f"{json.dumps(key)} = {_toml(value)}" for key, value in values.items())
