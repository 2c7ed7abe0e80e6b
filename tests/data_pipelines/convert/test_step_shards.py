"""An index's frames as step records: the new index reads what the old one reads."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from data_pipelines.convert.shared_index import shared_index
from data_pipelines.convert.step_shards import (
    WrittenShard,
    check_cameras,
    write_records_index,
    write_shard,
)
from data_pipelines.frames import FrameReader
from data_pipelines.index.format import Index
from data_pipelines.index.parts import index_source
from tests.data_pipelines.convert import made_source
from tests.data_pipelines.convert.made_source import EPISODES, MadeSource


@pytest.fixture
def source(tmp_path: Path) -> MadeSource:
    return made_source.make(tmp_path / "source")


@pytest.fixture
def index(source: MadeSource, tmp_path: Path) -> Index:
    return index_source(source, tmp_path / "index", workers=1, max_bad_fraction=1.0)


def convert(index: Index, output: Path, cameras: list[str]) -> list[WrittenShard]:
    """All files, last first, as workers may finish; each as it comes back as JSON."""
    shards = [write_shard(index, shard, str(output), cameras) for shard in (2, 1, 0)]
    return [WrittenShard(**json.loads(json.dumps(asdict(shard)))) for shard in shards]


@pytest.mark.parametrize("cameras", [["front", "wrist"], ["wrist"]])
def test_the_new_index_says_what_the_old_one_says(
    index: Index, tmp_path: Path, cameras: list[str]
) -> None:
    output = tmp_path / "out"
    shards = convert(index, output, cameras)
    found = write_records_index(tmp_path / "new", index, shards, str(output), cameras)

    assert [(shard.episodes, shard.steps) for shard in shards] == [(1, 6), (2, 7), (2, 7)]
    assert len(found) == len(index) == sum(map(sum, EPISODES)) - sum(map(len, EPISODES))
    assert list(found.header.cameras) == cameras
    assert {camera.kind for camera in found.header.cameras.values()} == {"record"}
    assert found.header.source == str(output)
    assert found.header.counts == index.header.counts
    assert found.header.counts["empty_episodes"] == 1
    for name in ("actions", "states", "rows"):
        np.testing.assert_array_equal(getattr(found, name), getattr(index, name))
    for name in ("first_row", "rows", "first_frame", "frames", "success"):
        np.testing.assert_array_equal(found.episodes[name], index.episodes[name])
    for row in range(len(index)):
        assert found.annotation(row) == index.annotation(row)
        assert found.instruction(row) == index.instruction(row)
    for episode in range(len(index.episodes)):
        assert found.key(episode) == index.key(episode)
    assert index.annotation(1) is not None
    for camera in cameras:
        for frame in range(index.header.counts["stored_steps"]):
            ours, theirs = FrameReader(found), FrameReader(index)
            np.testing.assert_array_equal(ours.image(camera, frame), theirs.image(camera, frame))


def test_files_follow_those_of_the_source(index: Index, tmp_path: Path) -> None:
    (last, *_) = convert(index, tmp_path / "out", ["front"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        f"made-train.array_record-0000{shard}-of-00003" for shard in range(3)
    ]
    assert last.path == "made-train.array_record-00002-of-00003"
    assert last.size == (tmp_path / "out" / last.path).stat().st_size
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    convert(index, tmp_path / "again", ["front"])
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}


def test_a_record_is_named_by_its_number(index: Index, tmp_path: Path) -> None:
    shards = convert(index, tmp_path / "out", ["front"])
    found = write_records_index(tmp_path / "new", index, shards, str(tmp_path / "out"), ["front"])
    assert index.where(3) == f"{index.source}/frames-0, record 1, step 1"
    assert found.where(3).endswith("made-train.array_record-00000-of-00003, record 4, step 1")


def test_a_file_that_is_missing(index: Index, tmp_path: Path) -> None:
    shards = convert(index, tmp_path / "out", ["front"])
    folder, output = tmp_path / "new", str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out: files \[0, 2\] were written; 3 make it up"):
        write_records_index(folder, index, [shards[0], shards[2]], output, ["front"])
    assert not folder.exists()


def test_damaged_frames(source: MadeSource, index: Index, tmp_path: Path) -> None:
    file = Path(source.source) / "frames-0"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"frames-0, record 1, step 2, camera 'wrist': the bytes "):
        write_shard(index, 0, str(tmp_path / "out"), ["wrist"])
    file.write_bytes(data[:-3])
    with pytest.raises(ValueError, match=r"frames-0: .* the file is shorter"):
        write_shard(index, 0, str(tmp_path / "out"), ["wrist"])
    file.unlink()
    with pytest.raises(FileNotFoundError, match="frames-0"):
        write_shard(index, 0, str(tmp_path / "out"), ["wrist"])
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        (["front", "left"], r"cameras \['left'\]: .*index has front, wrist"),
        ([], r"cameras \[\]: .*index has front, wrist"),
        (["wrist"], "camera 'wrist' are of kind 'video'; only encoded images become step records"),
    ],
)
def test_cameras_that_cannot_be(index: Index, cameras: list[str], message: str) -> None:
    videos = replace(index.header.cameras["wrist"], kind="video")
    header = replace(index.header, cameras={**index.header.cameras, "wrist": videos})
    check_cameras(index, ["front", "wrist"])
    with pytest.raises(ValueError, match=message):
        check_cameras(replace(index, header=header), cameras)


def test_workers_open_an_index_from_a_url(index: Index) -> None:
    system = fsspec.filesystem("memory")
    system.put(str(index.folder), "/shared/index", recursive=True)
    found = shared_index("memory://shared/index", index.source)
    assert found.header.digest == index.header.digest
    np.testing.assert_array_equal(found.rows, index.rows)
    assert shared_index("memory://shared/index", index.source) is found
    assert shared_index(str(index.folder)).folder == index.folder
