"""Bytes of local and remote files: the same few functions for paths and for URLs.

    /data/x    file:///data/x                         local: the operating system's own calls
    gs://b/x   s3://b/x   https://h/x   memory://x    remote: fsspec's file system of that name

fsspec's file systems for gs://, s3:// and http:// need packages of their own: the extra `cloud`.
Every error names the file or URL.
"""

import os
import posixpath
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

PathLike = str | os.PathLike[str]
# How much of a remote file is fetched at a time when it is read from start to end, in bytes.
BLOCK_BYTES = 16 * 2**20
# What file systems tell of a file that changes with it; the first ones follow its content alone.
_MARKS = ("md5Hash", "Content-MD5", "ETag", "etag", "mtime", "Last-Modified", "created")


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What is known of a file without reading it.

    Attributes:
      size: bytes.
      stamp: changes when the file does, as far as its file system says, such as "mtime 17" or
        "ETag x"; empty where it says nothing. Stamps of another kind cannot be compared.
    """

    size: int
    stamp: str = ""


def is_local(path: PathLike) -> bool:
    """True for a path or a file:// URL."""
    return _local(path) is not None


def locate(path: PathLike) -> Path | str:
    """A local file as a Path, another one as the URL, without a slash at its end."""
    local = _local(path)
    return os.fspath(path).rstrip("/") if local is None else Path(local)


def local_path(path: PathLike, what: str = "path") -> Path:
    """The path of a local file; a ValueError, which says `what` it is, for a URL elsewhere."""
    found = locate(path)
    if isinstance(found, str):
        raise ValueError(f"{what} {found} is a URL; it must be a local path")
    return found


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
        if not _is_http(path):
            return bool(system.exists(name))
        try:
            # Unless it is strict, a server that does not answer is one that has not got the file.
            return bool(system.exists(name, strict=True))
        except _remote_errors() as error:
            if getattr(error, "status", None) in _NOT_FOUND:
                return False
            raise


def size(path: PathLike) -> int:
    """Bytes of a file."""
    local = _local(path)
    if local is not None:
        return os.stat(local).st_size
    with naming(path):
        system, name = _remote(path)
        return _remote_facts(system.info(name)).size


def facts(folder: PathLike, names: Sequence[str]) -> list[FileFacts | None]:
    """Of several files below a folder, None for a missing one; one request a folder if possible."""
    if is_local(folder) or _is_http(folder):
        return [_facts_or_none(join(folder, name)) for name in names]
    places = [posixpath.split(name) for name in names]
    listed = {place: _listed(join(folder, place)) for place in {place for place, _ in places}}
    return [listed[place].get(name) for place, name in places]


def list_files(folder: PathLike) -> Mapping[str, FileFacts]:
    """The files that lie directly in a folder, by name."""
    local = _local(folder)
    if local is not None:
        with os.scandir(local) as entries:
            return {entry.name: _local_facts(entry.stat()) for entry in entries if entry.is_file()}
    with naming(folder):
        system, name = _remote(folder)
        listed = system.ls(name, detail=True)
        files = (info for info in listed if info["type"] == "file")
        return {os.path.basename(info["name"]): _remote_facts(info) for info in files}


def fetch_folder(url: PathLike, folder: PathLike) -> None:
    """Copies the files that lie directly in a remote folder into a local one."""
    with naming(url):
        system, name = _remote(url)
        for file in list_files(url):
            system.get_file(f"{name.rstrip('/')}/{file}", f"{os.fspath(folder)}/{file}")


def send_files(folder: PathLike, names: Iterable[str], url: PathLike) -> None:
    """Copies files of a local folder into a remote one, in order."""
    for name in names:
        with naming(join(url, name)):
            system, file = _remote(join(url, name))
            system.put_file(f"{os.fspath(folder)}/{name}", file)


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
      ValueError: the file ends earlier, or its server does not serve ranges.
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
    if len(data) > length:
        raise ValueError(
            f"{os.fspath(path)}: {len(data)} bytes came when {length} at {offset} were asked for: "
            f"the server sends whole files only, but frames are read by ranges (HTTP's Range)"
        )
    if len(data) < length:
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
        cause = error.__cause__
        # fsspec's HTTP says so, too, when a server fails.
        if _is_http(path) and cause and getattr(cause, "status", None) not in _NOT_FOUND:
            raise _failed(path, cause) from error
        raise FileNotFoundError(f"{os.fspath(path)}: not found") from error
    except ValueError as error:
        known = os.fspath(path) in str(error)
        raise ValueError(str(error) if known else f"{os.fspath(path)}: {error}") from error
    except _remote_errors() as error:
        if isinstance(error, OSError) and os.fspath(path) in str(error):
            raise
        raise _failed(path, error) from error


# What the libraries behind fsspec raise besides OSError, by the module that defines it.
_CLIENT_ERRORS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}


def _remote_errors() -> tuple[type[Exception], ...]:
    """OSError and those of the libraries that are loaded: another one cannot have raised any."""
    loaded = {module: names for module, names in _CLIENT_ERRORS.items() if module in sys.modules}
    own = [getattr(sys.modules[module], name) for module in loaded for name in loaded[module]]
    return OSError, *own


# HTTP's answers that mean "there is none"; a bucket's server says 403 where it may not list.
_NOT_FOUND = (403, 404, 410)


def _failed(path: PathLike, error: BaseException) -> OSError:
    """What to raise where a remote file system fails."""
    return OSError(f"{os.fspath(path)} cannot be read: {type(error).__name__}: {error}")


def _is_http(path: PathLike) -> bool:
    return os.fspath(path).startswith(("http://", "https://"))


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


def _listed(folder: str) -> Mapping[str, FileFacts]:
    """`list_files`, nothing of a missing folder."""
    try:
        return list_files(folder.rstrip("/"))
    except FileNotFoundError:
        return {}


def _facts_or_none(path: str) -> FileFacts | None:
    local = _local(path)
    try:
        if local is not None:
            return _local_facts(os.stat(local))
        with naming(path):
            system, name = _remote(path)
            return _remote_facts(system.info(name))
    except FileNotFoundError:
        return None


def _local_facts(found: os.stat_result) -> FileFacts:
    return FileFacts(size=found.st_size, stamp=f"mtime {found.st_mtime_ns}")


def _remote_facts(info: Mapping[str, Any]) -> FileFacts:
    """What fsspec tells of a file."""
    if info["size"] is None:
        raise ValueError(f"{info['name']}: the server does not tell the file's size")
    stamps = (f"{mark} {info[mark]}" for mark in _MARKS if info.get(mark))
    return FileFacts(size=int(info["size"]), stamp=next(stamps, ""))
