"""Step records: what is written is read, by many threads, and damage is named."""

import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.convert import step_records
from data_pipelines.convert.step_records import read_frame, write


def frames(step: int, size: int = 500) -> dict[str, bytes]:
    random = np.random.default_rng(step)
    return {camera: random.bytes(size + step) for camera in ("wrist", "image_0")}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "set-train.array_record-00000-of-00001"
    assert write(path, map(frames, range(40))) == 40
    return path


def test_reads_what_was_written(path: Path) -> None:
    for step in (39, 0, 17):
        for camera, data in frames(step).items():
            assert read_frame(path, step, camera) == data
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_record_is_a_plain_example_of_its_own(path: Path) -> None:
    """Any reader of ArrayRecord files sees an Example; nothing is grouped or compressed."""
    reader = ArrayRecordReader(str(path))
    assert "group_size:1," in reader.writer_options_string()
    assert "uncompressed" in reader.writer_options_string()
    (data,) = reader.read([3])
    features = tf_example_pb2.Example.FromString(data).features.feature
    assert {key: list(value.bytes_list.value) for key, value in features.items()} == {
        camera: [data] for camera, data in frames(3).items()
    }


def test_equal_frames_make_equal_files(path: Path, tmp_path: Path) -> None:
    reordered = (dict(reversed(frames(step).items())) for step in range(40))
    write(tmp_path / "again", reordered)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_threads_share_a_reader(path: Path) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in np.random.default_rng(seed).integers(0, 40, 200).tolist():
            if read_frame(path, step, "wrist") != frames(step)["wrist"]:
                wrong.append(step)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_more_files_than_open_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = step_records.OPEN_READERS + 20
    for number in range(count):
        write(tmp_path / str(number), [{"a": b"%d" % number}])
    resource.setrlimit(resource.RLIMIT_NOFILE, (step_records.OPEN_READERS + 200, limit[1]))
    try:
        for number in (*range(count), 0):
            assert read_frame(tmp_path / str(number), 0, "a") == b"%d" % number
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        step_records._reader.cache_clear()


def test_a_failed_writing_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[dict[str, bytes]]:
        yield frames(0)
        raise ValueError("the source is broken")

    with pytest.raises(ValueError, match="the source is broken"):
        write(tmp_path / "out" / "x", broken())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"x: .*[Ff]ile too large"):
            write(tmp_path / "x", map(frames, range(100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


def test_writes_to_a_url() -> None:
    fsspec = pytest.importorskip("fsspec")
    assert write("memory://records/a", map(frames, range(3))) == 3
    assert fsspec.filesystem("memory").exists("/records/a")
    with pytest.raises(ValueError, match="memory://records/a: ArrayRecord files are read from a"):
        read_frame("memory://records/a", 0, "wrist")


@pytest.mark.parametrize(
    ("record", "camera", "message"),
    [
        (40, "wrist", "has 40 records, no record 40"),
        (-1, "wrist", "has 40 records, no record -1"),
        (5, "left", "record 5 has no camera 'left'; it has: image_0, wrist"),
    ],
)
def test_unknown_frames(path: Path, record: int, camera: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_frame(path, record, camera)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file"):
        read_frame(tmp_path / "nowhere", 0, "wrist")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_an_incomplete_file(path: Path, tmp_path: Path, damage: str) -> None:
    data = path.read_bytes()
    other = tmp_path / damage
    kept = {"truncated": data[: len(data) // 2], "foreign": b"junk" * 9000, "empty": b""}[damage]
    other.write_bytes(kept)
    with pytest.raises(ValueError, match=f"{damage} has no record: it is truncated or is no Arr"):
        read_frame(other, 0, "wrist")


def test_a_flipped_byte(path: Path, tmp_path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(frames(0)["wrist"]) + 7] ^= 1
    other = tmp_path / "flipped"
    other.write_bytes(data)
    with pytest.raises(ValueError, match=r"flipped, record 0: .*mismatch"):
        read_frame(other, 0, "wrist")
    assert read_frame(other, 30, "wrist") == frames(30)["wrist"]
