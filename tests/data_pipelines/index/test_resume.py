"""Interrupted, unlucky and repeated runs: the result is the one of an undisturbed run, or none."""

import errno
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.index import writer as index_writer
from data_pipelines.index.build import (
    StaleIndex,
    build_index,
    index_source,
    open_index,
    open_or_build,
)
from data_pipelines.index.format import SCHEMA_VERSION, EpisodeEntry
from data_pipelines.index.source import ShardFacts
from data_pipelines.rlds.source import RldsSource
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    frame,
    tabletop_record,
    write_directory,
    write_tabletop,
)

SHARDS = [[tabletop_record(10 * s + n, 2 + n) for n in range(2)] for s in range(4)]
SHARD = "lara_tabletop-train.tfrecord-0000{}-of-00004"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tabletop(tmp_path, *SHARDS)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Killed(RldsSource):
    """A source whose process dies, as of `kill -9`, in the middle of its third shard."""

    def episodes(self, shard: int) -> Generator[EpisodeEntry, None, ShardFacts]:
        entries = super().episodes(shard)
        yield next(entries)
        if shard == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield from entries)


class Counted(RldsSource):
    """A source that writes down which shards are read."""

    def episodes(self, shard: int) -> Generator[EpisodeEntry, None, ShardFacts]:
        with open(f"{self.source}/read", "a") as file:
            file.write(str(shard))
        return (yield from super().episodes(shard))


def index_and_die(path: Path, folder: Path) -> None:
    """Run in a child process: killed while it indexes."""
    index_source(Killed.read(path, "train"), folder, workers=1)


def merge_and_die(path: Path, folder: Path) -> None:
    """Run in a child process: killed while it puts the parts together."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    finish = index_writer.IndexWriter.finish

    def killed(self: Any, header: Any) -> Any:
        return die() if self.folder.name == "index" else finish(self, header)

    index_writer.IndexWriter.finish = killed  # type: ignore[method-assign]
    index_source(RldsSource.read(path, "train"), folder, workers=1)


def killed(victim: Any, root: Path) -> None:
    """Makes root/1.0.0, and root/killed.parts by a run that is killed."""
    path = write_tabletop(root, *SHARDS)
    child = multiprocessing.get_context("spawn").Process(
        target=victim, args=(path, root / "killed")
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def killed_while_reading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    killed(index_and_die, root)
    return root


def test_a_run_killed_while_it_reads_goes_on_and_ends_as_an_undisturbed_one(
    killed_while_reading: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(killed_while_reading, tmp_path / "root"))
    assert not (root / "killed").exists() and (root / "killed.parts").is_dir()
    index_source(Counted.read(root / "1.0.0", "train"), root / "killed", workers=1)
    assert (root / "1.0.0/read").read_text() == "23"
    index_source(RldsSource.read(root / "1.0.0", "train"), root / "undisturbed", workers=1)
    assert contents(root / "killed") == contents(root / "undisturbed")
    assert not (root / "killed.parts").exists()


def test_a_run_killed_while_it_merges_reads_nothing_again(tmp_path: Path) -> None:
    killed(merge_and_die, tmp_path)
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.parts").is_dir()
    index_source(Counted.read(tmp_path / "1.0.0", "train"), tmp_path / "killed", workers=1)
    assert not (tmp_path / "1.0.0/read").exists()
    index_source(RldsSource.read(tmp_path / "1.0.0", "train"), tmp_path / "undisturbed", workers=1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_parts_of_data_that_changed_and_damaged_parts_are_made_anew(
    killed_while_reading: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(killed_while_reading, tmp_path / "root"))
    other = write_tabletop(tmp_path / "other", [tabletop_record(9, 3), tabletop_record(8, 2)])
    data = (other / "lara_tabletop-train.tfrecord-00000-of-00001").read_bytes()
    (root / "1.0.0" / SHARD.format(0)).write_bytes(data)
    (part,) = (root / "killed.parts").glob("000001-*")
    flip(part / "actions.bin")
    index = index_source(Counted.read(root / "1.0.0", "train"), root / "killed", workers=1)
    assert (root / "1.0.0/read").read_text() == "0123"
    np.testing.assert_array_equal(index.actions[:3], tabletop_record(9, 3)["steps/action"])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_failed_run_keeps_the_older_index(path: Path) -> None:
    before = contents(build_index(path, "train", workers=1).folder)
    file = path / SHARD.format(3)
    data = file.read_bytes()
    file.write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"00003-of-00004, record 1: truncated"):
        build_index(path, "train", workers=1)
    assert contents(path / "lara_index/train") == before
    file.write_bytes(data)
    after = contents(build_index(path, "train", workers=1).folder)
    assert without_stamps(after.pop("index.json")) == without_stamps(before.pop("index.json"))
    assert after == before


def without_stamps(header: bytes) -> Any:
    """A header but for the times of its files."""
    values = json.loads(header)
    return values | {"files": [file | {"stamp": ""} for file in values["files"]]}


def test_an_error_in_a_worker_names_file_and_record(path: Path) -> None:
    file = path / SHARD.format(2)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"00002-of-00004, record 1: truncated"):
        build_index(path, "train", workers=2)


def test_a_full_disk_is_one_error_that_names_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a full disk."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def full(*arguments: Any) -> Any:
        return Full(open(*arguments))  # the writer closes it

    monkeypatch.setattr(index_writer, "open", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: '/.*\.bin'") as caught:
        build_index(path, "train", workers=1)
    assert caught.value.errno == errno.ENOSPC
    assert not (path / "lara_index/train").exists()


def index_within(path: Path, size: int, result: Any) -> None:
    """Run in a child process: files may not grow beyond `size` bytes."""
    sys.stderr = io.StringIO()  # which may be a file, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        build_index(path, "train", workers=1)
    except OSError as error:
        result.put(str(error))


def test_a_file_that_cannot_grow_leaves_nothing_half_written(path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    result = spawn.Queue()
    child = spawn.Process(target=index_within, args=(path, 200, result))
    child.start()
    message = result.get(timeout=60)
    child.join(60)
    assert re.search(r"File too large: '/.*lara_index/train\.parts/", message)
    assert not (path / "lara_index/train").exists()
    assert len(build_index(path, "train", workers=1)) == 20


def test_a_fresh_index_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build_index(path, "train", workers=1).folder
    made = (folder / "index.json").stat().st_mtime_ns
    for index in (
        build_index(path, "train", workers=1, verify=True),
        open_index(path, "train", verify=True),
        open_or_build(path, "train"),
    ):
        assert (index.folder / "index.json").stat().st_mtime_ns == made
    assert "anew" not in capsys.readouterr().err


def other_size(path: Path) -> None:
    file = path / SHARD.format(1)
    file.write_bytes(file.read_bytes() + b"x")


def other_records(path: Path) -> None:
    file = path / SHARD.format(1)
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    size = int.from_bytes(data[:8], "little")
    first, second = bytes(data[12 : 12 + size]), bytes(data[12 + size + 4 + 12 : -4])
    file.write_bytes(frame(first) + frame(second))


def damaged_array(path: Path) -> None:
    flip(path / "lara_index/train/actions.bin")


def truncated_array(path: Path) -> None:
    file = path / "lara_index/train/actions.bin"
    file.write_bytes(file.read_bytes()[:-1])


def header_of(path: Path) -> Path:
    return path / "lara_index/train/index.json"


def edited(path: Path, before: str, after: str) -> None:
    file = header_of(path)
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


STALE = [
    (other_size, False, r"stale.*00001-of-00004 has \d+ bytes, it had \d+"),
    (other_records, True, r"stale.*00001-of-00004 holds something else"),
    (other_records, False, r"stale.*00001-of-00004 holds something else"),
    (damaged_array, True, r"actions\.bin is damaged"),
    (truncated_array, False, r"actions\.bin: \d+ bytes, .*incomplete"),
    (
        lambda path: edited(path, f'"schema_version": {SCHEMA_VERSION}', '"schema_version": 0'),
        False,
        rf"schema version 0; this release reads {SCHEMA_VERSION}",
    ),
    (
        lambda path: edited(path, '"control_hz": 5.0', '"control_hz": 6.0'),
        False,
        r"stale.*the definition of dataset 'lara_tabletop' has changed",
    ),
    (
        lambda path: edited(path, f'"schema_version": {SCHEMA_VERSION}', ""),
        False,
        r"index\.json is damaged",
    ),
    (lambda path: edited(path, '"split"', '"extra"'), False, r"index\.json is damaged.*extra"),
    (
        lambda path: edited(path, '"control_hz": 5.0,', ""),
        False,
        r"index\.json is damaged.*control_hz missing",
    ),
    (
        lambda path: header_of(path).write_text(f'{{"schema_version": {SCHEMA_VERSION}}}'),
        False,
        r"index\.json is damaged \(KeyError",
    ),
    (lambda path: header_of(path).write_text("[]"), False, r"index\.json: schema version None"),
]


@pytest.mark.parametrize(("change", "verify", "message"), STALE)
def test_a_stale_index_is_refused_with_the_reason_and_made_anew(
    path: Path, change: Any, verify: bool, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(build_index(path, "train", workers=1).folder)
    change(path)
    with pytest.raises(StaleIndex, match=message):
        open_index(path, "train", verify=verify)
    if change not in (other_size, other_records):
        build_index(path, "train", workers=1, verify=verify)
        assert "makes the index anew: " in capsys.readouterr().err
        assert contents(path / "lara_index/train") == before


@pytest.mark.parametrize("touched", [False, True])
def test_a_flipped_bit_of_the_data_is_found(path: Path, touched: bool) -> None:
    """By --verify whatever the file's time is, and by itself where the file was touched."""
    build_index(path, "train", workers=1)
    file = path / SHARD.format(1)
    before, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    if not touched:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    for call in (open_index, build_index):
        with pytest.raises(ValueError, match=rf"{file.name}, record \d: bad CRC of the data"):
            call(path, "train", verify=not touched)


def test_changed_data_are_indexed_anew(path: Path, tmp_path: Path) -> None:
    build_index(path, "train", workers=1)
    longer = write_tabletop(tmp_path / "longer", [tabletop_record(0, 9), tabletop_record(1, 9)])
    data = (longer / "lara_tabletop-train.tfrecord-00000-of-00001").read_bytes()
    (path / SHARD.format(0)).write_bytes(data)
    with pytest.raises(StaleIndex, match="stale"):
        open_or_build(path, "train")
    assert len(build_index(path, "train", workers=1)) == 20 - 5 + 18


def test_an_index_of_other_data_is_refused(path: Path, tmp_path: Path) -> None:
    build_index(path, "train", workers=1)
    for before, after, message in (
        ('"version": "1.0.0"', '"version": "2.0.0"', r"other data: version '2\.0\.0'"),
        ('"split": "train"', '"split": "val"', r"other data: split 'val', asked for 'train'"),
    ):
        edited(path, before, after)
        for call in (open_index, build_index, open_or_build):
            with pytest.raises(ValueError, match=message) as caught:
                call(path, "train")
            assert not isinstance(caught.value, StaleIndex)
        edited(path, after, before)
    other = write_directory(
        tmp_path / "o/1.0.0", "toto", TABLETOP_FEATURES, {"train": [[tabletop_record(0, 4)]]}
    )
    made = build_index(other, "train", workers=1, name="lara_tabletop")
    edited(other, '"dataset": "lara_tabletop"', '"dataset": "x"')
    for call in (open_index, build_index, open_or_build):
        with pytest.raises(ValueError, match=r"other data: dataset 'x', asked for 'lara_tabl"):
            call(path, "train", made.folder)
    with pytest.raises(FileNotFoundError, match=r"has no index at .*run `lara data index"):
        open_index(path, "train", tmp_path / "nowhere")
