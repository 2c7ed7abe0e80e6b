"""Files that appear at once, when they are complete, on a local disk or in a bucket."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from data_pipelines import storage


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local path to write to; the file appears under its name when the block ends without error.

    Args:
      path: of the file, or its URL; an older file is replaced.
    """
    local = storage.is_local(path)
    final = Path(os.fspath(path).removeprefix("file://")) if local else None
    if final is not None:
        final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final and final.parent, prefix=".partial.") as folder:
        written = Path(folder) / os.fspath(path).rsplit("/", 1)[-1]
        yield written
        if final is not None:
            os.replace(written, final)
        else:
            with storage.naming(path):
                system, name = fsspec.core.url_to_fs(os.fspath(path))
                system.put_file(str(written), name)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """A local folder for files: `path` itself, or one that is uploaded to the URL at the end."""
    if storage.is_local(path):
        yield storage.absolute(path)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(temporary, "folder")
        yield folder
        for file in sorted(os.listdir(folder)):
            with storage.naming(path):
                system, name = fsspec.core.url_to_fs(storage.join(path, file))
                system.put_file(os.path.join(folder, file), name)


@contextmanager
def updated_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local file to change: `path` itself, or a copy that is uploaded to the URL at the end."""
    if storage.is_local(path):
        yield Path(storage.absolute(path))
        return
    with new_file(path) as copy:
        if storage.exists(path):
            copy.write_bytes(storage.read_range(path, 0, storage.size(path)))
        yield copy


def delete_folder(path: str | os.PathLike[str]) -> None:
    """Deletes a folder and what is in it, if there is one."""
    with storage.naming(path):
        system, name = fsspec.core.url_to_fs(os.fspath(path))
        if system.exists(name):
            system.rm(name, recursive=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a file at once, UTF-8."""
    with new_file(path) as file:
        file.write_text(text, encoding="utf-8")
