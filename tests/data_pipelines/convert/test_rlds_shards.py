"""A LeRobot set as RLDS, shard by shard: what one process writes, and a definition to read it."""

import json
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import pytest

from data_pipelines.convert.rlds_shards import (
    DEFINITION_FILE,
    WrittenEpisodes,
    definition,
    tasks,
    write_description,
    write_shard,
)
from data_pipelines.index.build import open_source
from data_pipelines.lerobot.rlds import converted_spec, rlds_episodes, rlds_features
from data_pipelines.lerobot.source import LeRobotSource
from data_pipelines.oxe.registry import REGISTRY, load_definitions
from data_pipelines.rlds.directory import Directory
from data_pipelines.rlds.tfrecord import read_records
from tests.data_pipelines.lerobot import sets

SPLITS = ("train", "valid")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LeRobotSource]:
    root = sets.write_bridge(tmp_path_factory.mktemp("lerobot") / "my_robot", version="v3.0")
    return {split: LeRobotSource.read(root, split) for split in SPLITS}


def convert(sources: dict[str, LeRobotSource], folder: Path) -> list[WrittenEpisodes]:
    """All files, last first; each as it comes back as JSON."""
    elements = [task for source in sources.values() for task in tasks(source, "made")]
    written = [write_shard(sources, str(folder), task) for task in reversed(elements)]
    shards = [WrittenEpisodes(**json.loads(json.dumps(asdict(shard)))) for shard in written]
    write_description(sources, str(folder), "made", "1.0.0", shards)
    return shards


def test_equals_what_one_process_writes(sources: dict[str, LeRobotSource], tmp_path: Path) -> None:
    folder = tmp_path / "made" / "1.0.0"
    shards = convert(sources, folder)
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["dataset_info.json", "features.json", DEFINITION_FILE, *(shard.file for shard in shards)]
    )
    directory = Directory.read(folder)
    assert set(directory.features.values()) == set(rlds_features(sources["train"]))
    for split, source in sources.items():
        files = [
            [record.payload for record in read_records(folder / path.name)]
            for path in directory.splits[split].files
        ]
        assert tuple(map(len, files)) == directory.splits[split].shard_lengths
        assert list(chain(*files)) == [
            episode
            for shard in range(len(source.shard_episodes))
            for episode in rlds_episodes(source, shard)
        ]


def test_the_definition_reads_it(sources: dict[str, LeRobotSource], tmp_path: Path) -> None:
    folder = tmp_path / "made" / "1.0.0"
    convert(sources, folder)
    source = open_source(folder, "train", definitions=folder / DEFINITION_FILE)
    assert source.spec == replace(
        converted_spec(sources["train"]), name="made", aliases=(), folders=()
    )


@pytest.mark.parametrize("name", ["bridge_orig", "droid", "lara_tabletop", "kuka"])
def test_a_definition_says_all_of_a_spec(name: str, tmp_path: Path) -> None:
    spec = replace(REGISTRY[name], quirks='says "größe" \\ {x}\nand more')
    (tmp_path / "x.toml").write_text(definition(spec, "my set"), encoding="utf-8")
    datasets, _ = load_definitions(tmp_path / "x.toml")
    assert datasets == {"my set": replace(spec, name="my set", aliases=(), folders=())}


def test_a_failed_shard_leaves_no_dataset(
    sources: dict[str, LeRobotSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> object:
        yield b"one episode"
        raise ValueError("a damaged video")

    monkeypatch.setattr("data_pipelines.convert.rlds_shards.rlds_episodes", broken)
    with pytest.raises(ValueError, match="a damaged video"):
        convert(sources, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_without_episodes_is_no_file(
    sources: dict[str, LeRobotSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources["train"]
    (episodes,) = source.shard_episodes
    monkeypatch.setitem(source.__dict__, "shard_episodes", (episodes[:1], episodes[1:2], episodes))
    monkeypatch.setattr(
        LeRobotSource, "is_left_out", lambda _, episode: episode.number == episodes[1].number
    )
    assert [(task.shard, task.file) for task in tasks(source, "made")] == [
        (0, "made-train.tfrecord-00000-of-00002"),
        (2, "made-train.tfrecord-00001-of-00002"),
    ]
