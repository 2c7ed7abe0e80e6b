"""Indexes of data behind a URL: the same as of a local copy."""

import os
import re
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from data_pipelines import storage
from data_pipelines.frames import FrameReader
from data_pipelines.index.build import StaleIndex, build_index, open_index
from data_pipelines.index.format import Index
from data_pipelines.rlds.directory import Directory
from data_pipelines.rlds.tfrecord import read_records
from tests.data_pipelines.handmade import write_tabletop
from tests.data_pipelines.protobuf_reader import read_split

SHARD = "lara_tabletop-train.tfrecord-00001-of-00002"


class RangeHandler(SimpleHTTPRequestHandler):
    """Serves files below a folder, whole or the range that is asked for."""

    def send_head(self) -> Any:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            return super().send_head()
        size = path.stat().st_size
        first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        file = path.open("rb")
        file.seek(first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.remaining = last - first + 1
        return file

    def copyfile(self, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read(getattr(self, "remaining", -1)))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server on loopback that serves `tmp_path`."""
    pytest.importorskip("aiohttp", reason="fsspec's http:// needs aiohttp (the cloud extra)")
    handler = partial(RangeHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.fixture(params=["memory", "http", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A local directory and the URL of the same files."""
    path = write_tabletop(tmp_path)
    if request.param == "http":
        yield path, request.getfixturevalue("server") + "/1.0.0"
        return
    if request.param == "file":
        yield path, f"file://{path}"
        return
    url = f"memory://{tmp_path.name}/1.0.0"
    memory = fsspec.filesystem("memory")
    memory.put(f"{path}/", f"{url}/", recursive=True)
    yield path, url
    memory.rm(url, recursive=True)


def same_content(one: Index, other: Index) -> bool:
    return one.header.digest == other.header.digest and all(
        (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
        for name in one.header.arrays
    )


def test_a_remote_index_is_that_of_a_local_copy(
    remote: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, url = remote
    monkeypatch.setenv("LARA_JAX_CACHE", str(tmp_path / "cache"))
    local = build_index(path, "train", tmp_path / "local", workers=1)
    index = build_index(url, "train", workers=1)
    if not url.startswith("file"):
        assert index.folder.is_relative_to(tmp_path / "cache")
        assert index.source == url
    assert same_content(index, local)
    frames, expected = FrameReader(index), FrameReader(local)
    for number in (0, 5, 11):
        np.testing.assert_array_equal(
            frames.image("image", number), expected.image("image", number)
        )
    assert open_index(url, "train", verify=True).header.digest == index.header.digest


def test_a_directory_and_its_records_are_read_by_url(remote: tuple[Path, str]) -> None:
    path, url = remote
    here, there = Directory.read(path), Directory.read(url)
    assert (there.name, there.version, there.features) == (here.name, here.version, here.features)
    found, expected = read_split(there, "train"), read_split(here, "train")
    assert [example.payload for example in found] == [example.payload for example in expected]
    assert found[1].text("episode_metadata/file_path") == ["episode_1"]


def test_remote_errors_name_the_url(server: str, tmp_path: Path) -> None:
    path = write_tabletop(tmp_path)
    url = f"{server}/1.0.0"
    with pytest.raises(FileNotFoundError, match=rf"{server}/none is no TFDS version directory"):
        Directory.read(f"{server}/none")
    file = path / SHARD
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(ValueError, match=rf"{url}/{SHARD}, record 0: truncated"):
        list(read_records(f"{url}/{SHARD}"))
    with pytest.raises(ValueError, match=rf"{url}/{SHARD}, record 0: truncated"):
        build_index(url, "train", tmp_path / "index", workers=1)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{url}/{SHARD} is missing"):
        build_index(url, "train", tmp_path / "index", workers=1)


def test_a_server_that_fails_is_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RangeHandler, "send_head", lambda self: self.send_error(503, "try later"))
    url = f"{server}/1.0.0/dataset_info.json"
    for call in (storage.open_read, storage.size, storage.exists, storage.read_text):
        with pytest.raises(OSError, match=rf"{url} cannot be read: .*503") as caught:
            call(url)
        assert not isinstance(caught.value, FileNotFoundError)


def test_a_server_that_does_not_answer_is_no_missing_dataset(server: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/1.0.0"
    with pytest.raises(OSError, match=rf"{url}/\S+ cannot be read: .*onnect") as caught:
        build_index(url, "train")
    assert not isinstance(caught.value, FileNotFoundError)


def test_a_server_without_ranges_is_named(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tabletop(tmp_path)
    monkeypatch.setattr(RangeHandler, "send_head", SimpleHTTPRequestHandler.send_head)
    size = (path / SHARD).stat().st_size
    with pytest.raises(ValueError, match=rf"{SHARD}: {size} bytes came when 9 at 5 .*whole files"):
        storage.read_range(f"{server}/1.0.0/{SHARD}", 5, 9)


def test_a_remote_file_that_changed_makes_the_index_stale(tmp_path: Path) -> None:
    path = write_tabletop(tmp_path)
    url, memory = f"memory://stale-{tmp_path.name}/1.0.0", fsspec.filesystem("memory")
    memory.put(f"{path}/", f"{url}/", recursive=True)
    folder = tmp_path / "index"
    build_index(url, "train", folder, workers=1)
    memory.pipe(f"{url}/{SHARD}", (path / SHARD).read_bytes() + b"more")
    with pytest.raises(
        StaleIndex, match=rf"stale.*{os.path.basename(SHARD)} has \d+ bytes, it had"
    ):
        open_index(url, "train", folder)
    memory.rm(url, recursive=True)
