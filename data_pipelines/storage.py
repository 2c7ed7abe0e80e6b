"""Bytes of local and remote files: the same few functions for paths and for URLs.

    /data/x    file:///data/x                         local: the operating system's own calls
    gs://b/x   s3://b/x   https://h/x   memory://x    remote: fsspec's file system of that name

fsspec's file systems for gs://, s3:// and http:// need packages of their own: the extra `cloud`.
Every error names the file or URL.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

PathLike = str | os.PathLike[str]
# How much of a remote file is fetched at a time when it is read from start to end, in bytes.
BLOCK_BYTES = 16 * 2**20


def is_local(path: PathLike) -> bool:
    """True for a path or a file:// URL."""
    return _local(path) is not None


def locate(path: PathLike) -> Path | str:
    """A local file as a Path, another one as the URL, without a slash at its end."""
    local = _local(path)
    return os.fspath(path).rstrip("/") if local is None else Path(local)


def join(folder: PathLike, name: str) -> str:
    """A file of a folder."""
    return f"{os.fspath(folder).rstrip('/')}/{name}"


def absolute(path: PathLike) -> str:
    """A local path from the root on; a URL as it is, without a slash at its end."""
    local = _local(path)
    return os.fspath(path).rstrip("/") if local is None else os.path.abspath(local)


def exists(path: PathLike) -> bool:
    """True if there is such a file or folder."""
    local = _local(path)
    if local is not None:
        return os.path.exists(local)
    with naming(path):
        system, name = _remote(path)
        return bool(system.exists(name))


def size(path: PathLike) -> int:
    """Bytes of a file."""
    local = _local(path)
    if local is not None:
        return os.stat(local).st_size
    with naming(path):
        system, name = _remote(path)
        found = system.info(name)["size"]
    if found is None:
        raise ValueError(f"{os.fspath(path)}: the server does not tell the file's size")
    return int(found)


def sizes(folder: PathLike, names: Sequence[str]) -> list[int | None]:
    """Bytes of several files of a folder, None for a missing one; one request where it can be."""
    if is_local(folder) or os.fspath(folder).startswith(("http://", "https://")):
        return [_size_or_none(join(folder, name)) for name in names]
    found = list_files(folder)
    return [found.get(name) for name in names]


def list_files(folder: PathLike) -> Mapping[str, int]:
    """Names and bytes of the files that lie directly in a folder."""
    local = _local(folder)
    if local is not None:
        with os.scandir(local) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    with naming(folder):
        system, name = _remote(folder)
        listed = system.ls(name, detail=True)
    return {os.path.basename(x["name"]): x["size"] for x in listed if x["type"] == "file"}


def list_folders(folder: PathLike) -> tuple[str, ...]:
    """Names of the folders that lie directly in a folder, sorted."""
    local = _local(folder)
    if local is not None:
        with os.scandir(local) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir()))
    with naming(folder):
        system, name = _remote(folder)
        listed = system.ls(name, detail=True)
    names = (x["name"].rstrip("/") for x in listed if x["type"] == "directory")
    return tuple(sorted(os.path.basename(name) for name in names))


def stamp(path: PathLike) -> str:
    """Changes when the file does, as far as its file system says: cheap, of use on this machine."""
    local = _local(path)
    if local is not None:
        found = os.stat(local)
        return f"{found.st_size}-{found.st_mtime_ns}"
    with naming(path):
        system, name = _remote(path)
        return str(system.ukey(name))


def read_text(path: PathLike) -> str:
    """A whole file as UTF-8."""
    with naming(path), open_read(path) as file:
        return file.read().decode("utf-8")


def open_read(path: PathLike) -> BinaryIO:
    """A file to read from start to end; a remote one is fetched ahead of what is asked for."""
    local = _local(path)
    if local is not None:
        return open(local, "rb", buffering=0)
    with naming(path):
        system, name = _remote(path)
        return system.open(name, "rb", block_size=BLOCK_BYTES, cache_type="background")


def read_range(path: PathLike, offset: int, length: int) -> bytes:
    """`length` bytes of a file from `offset` on.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file ends earlier.
    """
    local = _local(path)
    if local is not None:
        file = os.open(local, os.O_RDONLY)
        try:
            data = os.pread(file, length, offset)
        finally:
            os.close(file)
    elif length:
        with naming(path):
            system, name = _remote(path)
            data = system.cat_file(name, start=offset, end=offset + length)
    else:
        data = b""
    if len(data) != length:
        raise ValueError(
            f"{os.fspath(path)}: {len(data)} of {length} bytes at {offset}; the file is shorter"
        )
    return data


@contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """Lets the errors of a remote file name its URL; a missing one is a FileNotFoundError."""
    if is_local(path):
        yield
        return
    try:
        yield
    except FileNotFoundError as error:
        # fsspec's HTTP says so, too, when a server fails.
        reason = error.__cause__ or "there is no such file"
        raise FileNotFoundError(f"{os.fspath(path)}: not found ({reason})") from error
    except ValueError as error:
        known = os.fspath(path) in str(error)
        raise ValueError(str(error) if known else f"{os.fspath(path)}: {error}") from error
    except Exception as error:  # the libraries behind fsspec raise classes that only they know
        raise OSError(f"{os.fspath(path)}: {type(error).__name__}: {error}") from error


def _local(path: PathLike) -> str | None:
    """The path of a local file, None for a remote one."""
    name = os.fspath(path)
    if name.startswith("file://"):
        return name.removeprefix("file://")
    return None if "://" in name else name


def _remote(url: PathLike) -> tuple[Any, str]:
    """The file system of a URL, and the file's name in it."""
    try:
        return fsspec.core.url_to_fs(os.fspath(url))
    except ImportError as error:
        raise ValueError(
            f"{os.fspath(url)}: {error}; install the extra `cloud` (lara-jax[cloud])"
        ) from error


def _size_or_none(path: str) -> int | None:
    try:
        return size(path)
    except FileNotFoundError:
        return None
