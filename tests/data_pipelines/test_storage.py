"""Files by path and by URL: the same answers, and errors that name the file."""

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipelines import cli, storage

DATA = bytes(range(256)) * 8


@pytest.fixture(params=["path", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder with the file "x", and "y" below "sub", of each kind of place."""
    place = {
        "path": str(tmp_path),
        "file": f"file://{tmp_path}",
        "memory": f"memory://storage-{tmp_path.name}",
    }[request.param]
    for name in ("x", "sub/y"):
        with fsspec.open(f"{place}/{name}", "wb", auto_mkdir=True) as file:
            file.write(DATA)
    yield place
    if request.param == "memory":
        fsspec.filesystem("memory").rm(place, recursive=True)


def test_reads_whole_files_and_ranges(folder: str) -> None:
    path = storage.join(folder, "x")
    assert storage.exists(path) and not storage.exists(path + "x")
    assert storage.size(path) == len(DATA)
    assert storage.read_range(path, 250, 20) == DATA[250:270]
    assert storage.read_range(path, 9, 0) == b""
    with storage.open_read(path) as file:
        assert file.read(3) + file.read() == DATA


def test_lists_files_with_sizes_and_stamps(folder: str) -> None:
    (facts,) = storage.list_files(folder).values()
    assert facts.size == len(DATA) and facts.stamp.split(" ")[0] in ("mtime", "created")
    names = ["none", "x", "sub/y", "none/z"]
    missing, same, below, neither = storage.facts(folder, names)
    assert (missing, same, neither) == (None, facts, None)
    assert below is not None and below.size == len(DATA)


def test_a_stamp_follows_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(DATA)
    (before,) = storage.facts(tmp_path, ["x"])
    os.utime(file, (1, 1))
    (after,) = storage.facts(tmp_path, ["x"])
    assert before is not None and after is not None
    assert before.size == after.size and before.stamp != after.stamp


def test_errors_name_the_file(folder: str) -> None:
    path = storage.join(folder, "none")
    for call in (storage.size, storage.read_text, lambda p: storage.read_range(p, 0, 1)):
        with pytest.raises(FileNotFoundError, match="none"):
            call(path)
    with pytest.raises(ValueError, match=r"x: 48 of 100 bytes at 2000; the file is shorter"):
        storage.read_range(storage.join(folder, "x"), 2000, 100)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(url: str) -> Any:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(ValueError, match=r"gs://b/x: .*gcsfs.*the extra `cloud`"):
        storage.size("gs://b/x")


def test_an_unknown_scheme_names_the_url() -> None:
    with pytest.raises(ValueError, match=r"nowhere://b/x: .*nowhere"):
        storage.exists("nowhere://b/x")


class HttpError(Exception):
    """As gcsfs has it: of no class that Python knows."""


def test_a_clients_own_errors_become_os_errors_that_name_the_url(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = types.ModuleType("gcsfs.retry")
    module.HttpError = HttpError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gcsfs.retry", module)
    with (
        pytest.raises(OSError, match=r"gs://b/x cannot be read: HttpError: 503"),
        storage.naming("gs://b/x"),
    ):
        raise HttpError("503")


def test_a_mistake_of_ours_stays_what_it_is() -> None:
    with pytest.raises(TypeError, match=r"^mine$"), storage.naming("gs://b/x"):
        raise TypeError("mine")


@pytest.mark.parametrize(
    ("path", "local", "absolute"),
    [
        ("/a/b/", True, "/a/b"),
        ("file:///a/b", True, "/a/b"),
        ("gs://a/b/", False, "gs://a/b"),
    ],
)
def test_local_and_absolute(path: str, local: bool, absolute: str) -> None:
    assert storage.is_local(path) == local
    assert storage.absolute(path) == absolute
    assert storage.locate(path) == (Path("/a/b") if local else "gs://a/b")


@pytest.mark.parametrize("verb", ["annotate", "inspect", "stats", "make-tabletop"])
@pytest.mark.parametrize("url", ["gs://b/x.json", "s3://b/x.json", "memory://x.json"])
def test_a_url_is_no_place_for_a_local_file(
    verb: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--episodes", "1"] if verb == "make-tabletop" else [str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, *data, f"--out={url}"])
    assert stop.value.code == 2
    assert (
        f"argument --out: path {url} is a URL; it must be a local path" in capsys.readouterr().err
    )


def test_a_local_path_may_be_written_as_a_url(tmp_path: Path) -> None:
    assert storage.local_path(f"file://{tmp_path}/x") == tmp_path / "x"
    assert storage.local_path("x") == Path("x")
