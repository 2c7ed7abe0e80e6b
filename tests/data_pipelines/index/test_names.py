"""Which definition data are read by, what identifies an index, which files are read again."""

import os
import pickle
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_pipelines import storage
from data_pipelines.convert.rlds_shards import definition
from data_pipelines.index import cli
from data_pipelines.index.build import StaleIndex, build_index, open_index, open_or_build
from data_pipelines.index.format import Index
from data_pipelines.index.shared import fetched, open_shared
from data_pipelines.oxe.registry import spec_named
from data_pipelines.rlds.source import RldsSource
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    tabletop_record,
    write_directory,
    write_tabletop,
)

INVERTED = """
[datasets.inverted]
control_hz = 5.0
cameras = { image = "observation/image" }
roles = { primary = "image" }
action = ["action[0:6]", "action[6:7] | invert"]
state = ["observation/state"]

"""
RECORDS = [tabletop_record(0, 4), tabletop_record(1, 3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A set whose files call it lara_tabletop."""
    return write_tabletop(tmp_path / "data", RECORDS)


@pytest.fixture
def definitions(tmp_path: Path) -> Path:
    """Another definition of the set, and the same one under another name."""
    file = tmp_path / "mine.toml"
    file.write_text(INVERTED + definition(spec_named("lara_tabletop"), "tabletop_too"))
    return file


def test_data_are_read_by_the_definition_that_is_named(path: Path, definitions: Path) -> None:
    index = build_index(path, "train", name="inverted", definitions=definitions)
    assert (index.header.dataset, index.spec.name) == ("inverted", "inverted")
    gripper = RECORDS[0]["steps/action"][:, 6]
    np.testing.assert_array_equal(index.actions[:4, 6], 1 - gripper)
    with pytest.raises(StaleIndex, match=r"run `lara data index \S+ --name lara_tabletop` again"):
        open_or_build(path, "train")
    assert build_index(path, "train").header.dataset == "lara_tabletop"


def test_the_command_that_a_message_names_works(
    path: Path, definitions: Path, tmp_path: Path
) -> None:
    names: dict[str, Any] = {"name": "inverted", "definitions": definitions}
    for folder in (None, tmp_path / "elsewhere/train"):
        with pytest.raises(FileNotFoundError, match="has no index") as missing:
            open_index(path, "train", folder, **names)
        build_index(path, "train", folder)
        with pytest.raises(StaleIndex, match="is stale") as stale:
            open_index(path, "train", folder, **names)
        for message in (str(missing.value), str(stale.value)):
            build_index(path, "train", folder)
            (command,) = re.findall("`lara data index (.*)`", message)
            assert cli.main(shlex.split(command)) == 0
            assert open_index(path, "train", folder, **names).header.dataset == "inverted"


def test_a_set_that_files_call_otherwise_needs_its_name(tmp_path: Path) -> None:
    shards = [[tabletop_record(0, 3)]]
    path = write_directory(tmp_path / "x/1.0.0", "o10", TABLETOP_FEATURES, {"train": shards})
    with pytest.raises(ValueError, match=r"x/1\.0\.0: unknown dataset 'o10'.* say which \(--name"):
        open_or_build(path, "train")
    index = open_or_build(path, "train", name="lara_tabletop")
    assert index.header.dataset == "lara_tabletop"


def test_the_same_definition_under_another_name_needs_no_other_index(
    path: Path, definitions: Path
) -> None:
    made = build_index(path, "train")
    header = (made.folder / "index.json").read_bytes()
    index = open_or_build(path, "train", name="tabletop_too", definitions=definitions)
    assert (index.header.dataset, index.spec.name) == ("tabletop_too", "tabletop_too")
    assert pickle.loads(pickle.dumps(index)).header.dataset == "tabletop_too"
    assert index.header.digest == made.header.digest
    assert (made.folder / "index.json").read_bytes() == header


def test_the_digest_follows_the_content_alone(path: Path, tmp_path: Path) -> None:
    index = build_index(path, "train")
    decoded = build_index(path, "train", tmp_path / "decoded", decode_frames=True)
    assert decoded.header.decoded and decoded.header.digest == index.header.digest
    copy = shutil.copytree(path, tmp_path / "copy")
    shutil.rmtree(copy / "lara_index")
    os.utime(next(copy.glob("*.tfrecord*")), (1, 1))
    assert build_index(copy, "train").header.digest == index.header.digest
    other = write_tabletop(tmp_path / "other", [tabletop_record(0, 4), tabletop_record(2, 3)])
    assert build_index(other, "train").header.digest != index.header.digest


def test_files_with_other_times_are_read_once_and_kept_if_they_hold_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    checksum = RldsSource.checksum

    def counted(source: Any, file: int) -> str:
        read.append(file)
        return checksum(source, file)

    monkeypatch.setattr(RldsSource, "checksum", counted)
    build_index(path, "train")
    open_index(path, "train")
    assert read == []
    os.utime(next(path.glob("*.tfrecord*")), (1, 1))
    for _ in range(2):
        open_index(path, "train")
        assert read == [0]


def test_a_bucket_is_not_compared_with_the_times_of_a_disk(path: Path) -> None:
    folder = build_index(path, "train").folder
    url = f"memory://names-{path.parent.name}-{os.getpid()}/1.0.0"
    memory = fsspec.filesystem("memory")
    memory.put(f"{path}/", f"{url}/", recursive=True)
    before = (folder / "index.json").read_bytes()
    assert open_index(url, "train", folder).source == url
    assert (folder / "index.json").read_bytes() == before
    memory.rm(url, recursive=True)


def test_others_may_read_an_index(path: Path) -> None:
    old = os.umask(0o022)
    try:
        folder = build_index(path, "train").folder
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.fixture(params=["folder", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder of indexes."""
    monkeypatch.setenv("LARA_JAX_CACHE", str(tmp_path / "cache"))
    if request.param == "folder":
        yield str(tmp_path / "indexes")
        return
    url = f"memory://indexes-{tmp_path.name}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def test_many_hosts_open_one_index(path: Path, root: str, definitions: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"--name inverted --definitions \S+ --out \S+/inverted`"
    ):
        open_shared(root, str(path), "train", name="inverted", definitions=definitions)
    arguments = [str(path), "--out", f"{root}/inverted", "--name", "inverted"]
    assert cli.main([*arguments, "--definitions", str(definitions)]) == 0
    for _ in range(2):
        index = open_shared(root, str(path), "train", name="inverted", definitions=definitions)
        assert (index.header.dataset, len(index)) == ("inverted", 7)
    assert storage.is_local(root) or "cache/fetched" in str(index.folder)


def test_a_mixture_is_indexed_by_name(tmp_path: Path, path: Path) -> None:
    shutil.move(path.parent, tmp_path / "sets" / "lara_tabletop")
    file = tmp_path / "m.toml"
    file.write_text('[mixtures.m]\nentries = [["lara_tabletop", 1.0]]\n')
    out = tmp_path / "out"
    arguments = ["--mixture", "m", "--out", str(out), "--definitions", str(file)]
    assert cli.main([str(tmp_path / "sets"), *arguments]) == 0
    assert Index.open(out / "lara_tabletop" / "train").header.dataset == "lara_tabletop"


def test_a_fetched_index_follows_the_one_at_the_url(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LARA_JAX_CACHE", str(tmp_path / "cache"))
    url = f"memory://fetched-{tmp_path.name}"
    assert cli.main([str(path), "--out", url]) == 0
    first = fetched(f"{url}/train")
    assert fetched(f"{url}/train") == first
    other = write_tabletop(tmp_path / "other", [tabletop_record(5, 9)])
    assert cli.main([str(other), "--out", url]) == 0
    assert len(Index.open(fetched(f"{url}/train"))) == 9 and len(Index.open(first)) == 7
    fsspec.filesystem("memory").rm(url, recursive=True)
