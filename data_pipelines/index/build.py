"""Makes, opens and checks the index of a dataset's split.

    /data/bridge_dataset/1.0.0/lara_index/train         beside the data, where one may write there
    ~/.cache/lara_jax/index/bridge_dataset-1.0.0-<hash>/train     of a remote or read-only directory

    build_index     one pass over the files, unless the index there is fresh   (`lara data index`)
    open_index      refuses an index that is stale or of other data, and says why
    open_or_build   what training calls: makes an index only where there is none

One process at a time makes an index; others wait for it and then find it made.
"""

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from data_pipelines import storage
from data_pipelines.annotate.readers import AnnotationProvider
from data_pipelines.index.annotations import attach_annotations
from data_pipelines.index.format import HEADER_FILE, Index
from data_pipelines.index.parts import check_bad_fraction, index_source, parts_folder
from data_pipelines.index.source import IndexSource, Shard, ShardFacts
from data_pipelines.lerobot import is_lerobot
from data_pipelines.oxe.registry import load_definitions
from data_pipelines.rlds.directory import Directory
from data_pipelines.rlds.source import RldsSource

__all__ = [
    "IndexSource",
    "Shard",
    "ShardFacts",
    "StaleIndex",
    "attach_annotations",
    "build_index",
    "index_folder",
    "index_source",
    "open_index",
    "open_or_build",
    "open_source",
    "splits_of",
]

SIDECAR = "lara_index"
CACHE_VARIABLE = "LARA_JAX_CACHE"


class StaleIndex(ValueError):
    """An index that `lara data index` makes anew: its source or its format has changed."""


def splits_of(path_or_url: str | os.PathLike[str]) -> tuple[str, ...]:
    """The splits of a TFDS version directory or of a LeRobot data set."""
    place = storage.absolute(path_or_url)
    if is_lerobot(place):  # imported here, as it needs an extra
        from data_pipelines.lerobot.meta import Metadata

        return tuple(Metadata.read(place).splits)
    return tuple(Directory.read(place).splits)


def open_source(
    path_or_url: str | os.PathLike[str],
    split: str,
    *,
    definitions: str | os.PathLike[str] | None = None,
    decode_frames: bool = False,
    flag_bad_frames: bool = False,
) -> IndexSource:
    """A split of a TFDS version directory or of a LeRobot data set.

    Args:
      path_or_url: where it lies.
      split: such as "train".
      definitions: a TOML file with datasets besides the built-in ones.
      decode_frames: decode every frame while indexing.
      flag_bad_frames: flag those that do not decode, instead of refusing the first.

    Raises:
      FileNotFoundError: there is no such dataset, or a file of it is missing.
      ValueError: an unknown dataset or split, or features that its definition names are missing.
    """
    datasets = load_definitions(definitions)[0] if definitions is not None else None
    place = storage.absolute(path_or_url)
    if is_lerobot(place):  # imported here, as it needs an extra
        from data_pipelines.lerobot.source import LeRobotSource

        return LeRobotSource.read(
            place,
            split,
            definitions=datasets,
            decode_frames=decode_frames,
            flag_bad_frames=flag_bad_frames,
        )
    return RldsSource.read(
        place,
        split,
        definitions=datasets,
        decode_frames=decode_frames,
        flag_bad_frames=flag_bad_frames,
    )


def index_folder(path_or_url: str | os.PathLike[str], split: str) -> Path:
    """Where the index of a dataset's split lies, or is to be made.

    Beside the data where an index lies there or the directory may be written to; else in the cache,
    under the last two names of its path, such as "bridge_dataset-1.0.0", and a hash of the whole.
    """
    place = storage.absolute(path_or_url)
    if storage.is_local(place):
        beside = Path(place) / SIDECAR / split
        if (beside / HEADER_FILE).is_file() or _may_write(Path(place)):
            return beside
    name = "-".join(place.split("://")[-1].split("/")[-2:])
    digest = hashlib.sha256(place.encode()).hexdigest()[:8]
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lara_jax")
    return cache / "index" / f"{name}-{digest}" / split


def open_index(
    path_or_url: str | os.PathLike[str],
    split: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    definitions: str | os.PathLike[str] | None = None,
    verify: bool = False,
) -> Index:
    """Opens the index of a dataset's split, if it is one of this data as it is now.

    Args:
      path_or_url: a TFDS version directory or a LeRobot data set.
      split: such as "train".
      folder: of the index; None for `index_folder`.
      definitions: a TOML file with datasets besides the built-in ones.
      verify: read the index's arrays and compare their checksums, and likewise the checksums that
        the source's records carry.

    Raises:
      FileNotFoundError: there is no index, or no such dataset.
      StaleIndex: it has another schema version, the source's files or the dataset's definition have
        changed since, or it is damaged. The message says which.
      ValueError: it is the index of other data.
    """
    folder = Path(folder) if folder is not None else index_folder(path_or_url, split)
    if not (folder / HEADER_FILE).is_file():
        raise FileNotFoundError(
            f"{os.fspath(path_or_url)}, split {split!r}, has no index at {folder}: "
            f"run `lara data index {os.fspath(path_or_url)}`"
        )
    source = open_source(path_or_url, split, definitions=definitions)
    return _open_checked(folder, source, verify=verify)


def build_index(
    path_or_url: str | os.PathLike[str],
    split: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    definitions: str | os.PathLike[str] | None = None,
    annotations: AnnotationProvider | None = None,
    workers: int | None = None,
    decode_frames: bool = False,
    max_bad_fraction: float | None = None,
    verify: bool = False,
) -> Index:
    """Makes the index of a dataset's split, or opens the one there is if it is fresh.

    Args:
      path_or_url, split, folder, definitions, verify: as for `open_index`.
      annotations: reasoning to take instead of the records' own.
      workers: processes; None for one a core, or one alone for small files. The result does not
        depend on it.
      decode_frames: decode every frame; one that does not decode is an error.
      max_bad_fraction: with `decode_frames`: flag rows that need such a frame, and fail only if
        they are more than this fraction of all rows.

    Raises:
      FileNotFoundError: there is no such dataset, or a file of it is missing.
      ValueError: the folder holds the index of other data; or the data are bad, in which case the
        message names file, record and step.
      OSError: a file of the index cannot be written, or one of a remote source not be read.
    """
    if max_bad_fraction is not None and not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction}; allowed 0 to 1")
    source = open_source(
        path_or_url,
        split,
        definitions=definitions,
        decode_frames=decode_frames,
        flag_bad_frames=max_bad_fraction is not None,
    )
    folder = Path(folder) if folder is not None else index_folder(path_or_url, split)
    index = _fresh(folder, source, verify=verify, report=False)
    if index is None or parts_folder(folder).exists():
        with _locked(folder):
            index = _fresh(folder, source, verify=verify, report=True)
            if index is None:
                index = index_source(
                    source, folder, workers=workers, max_bad_fraction=max_bad_fraction
                )
            shutil.rmtree(parts_folder(folder), ignore_errors=True)
    if decode_frames:
        check_bad_fraction(index.header.counts, max_bad_fraction, str(folder))
    if annotations is None or _has(index, annotations):
        return index
    with _locked(folder):
        index = Index.open(folder, source=source.source)
        return index if _has(index, annotations) else attach_annotations(index, annotations)


def open_or_build(
    path_or_url: str | os.PathLike[str],
    split: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    definitions: str | os.PathLike[str] | None = None,
    workers: int | None = None,
) -> Index:
    """Opens the index of a dataset's split, and makes it only where there is none.

    Other than `build_index`, this refuses an index that is stale. Arguments and errors as there;
    `path_or_url` may also be the folder of an index, and a directory that was converted to step
    records, which has no other description than its index.
    """
    place = storage.absolute(path_or_url)
    if storage.is_local(place):
        beside = Path(place) / SIDECAR / split
        if (Path(place) / HEADER_FILE).is_file():
            return Index.open(place)
        if (beside / HEADER_FILE).is_file() and not _is_described(place):
            return Index.open(beside, source=place)
    folder = Path(folder) if folder is not None else index_folder(path_or_url, split)
    if (folder / HEADER_FILE).is_file():
        return open_index(path_or_url, split, folder, definitions=definitions)
    return build_index(path_or_url, split, folder, definitions=definitions, workers=workers)


def _is_described(place: str) -> bool:
    """True of a TFDS version directory or a LeRobot data set."""
    return is_lerobot(place) or storage.exists(storage.join(place, "dataset_info.json"))


def _open_checked(folder: Path, source: IndexSource, *, verify: bool) -> Index:
    """An index that fits its source; see `open_index`."""
    try:
        index = Index.open(folder, source=source.source)
    except ValueError as error:
        raise StaleIndex(str(error)) from error
    header = index.header
    for name in ("dataset", "version", "split"):
        found, wanted = getattr(header, name), getattr(source, name)
        if found != wanted:
            raise ValueError(
                f"{folder} is the index of other data: {name} {found!r}, asked for {wanted!r}; "
                f"choose another folder or remove it"
            )
    again = f"the index {folder} is stale: run `lara data index {source.source}` again"
    if header.spec.fingerprint != source.spec.fingerprint:
        raise StaleIndex(
            f"{again}; the definition of dataset {header.spec.name!r} has changed "
            f"({header.spec.fingerprint}, now {source.spec.name!r}, {source.spec.fingerprint})"
        )
    if set(header.cameras) != set(source.cameras):
        raise StaleIndex(
            f"{again}; it has the cameras {sorted(header.cameras)}, "
            f"the data {sorted(source.cameras)}"
        )
    known, now = ({file.path: file.size for file in s.files} for s in (header, source))
    for name in sorted(known.keys() | now.keys()):
        if known.get(name) != now.get(name):
            raise StaleIndex(
                f"{again}; {storage.join(source.source, name)} has {now.get(name)} bytes, "
                f"it had {known.get(name)} (None: there is no such file)"
            )
    if verify:
        _verify(index, source, again)
    return index


def _verify(index: Index, source: IndexSource, again: str) -> None:
    """Compares all checksums of the index, and those that the source's records carry."""
    try:
        index.check()
    except ValueError as error:
        raise StaleIndex(str(error)) from error
    for number, file_now in enumerate(tqdm(source.files, desc="verify", unit="file")):
        (known,) = (f for f in index.header.files if f.path == file_now.path)
        if known.checksum != source.checksum(number):
            path = storage.join(source.source, known.path)
            raise StaleIndex(f"{again}; {path} holds other records than those that were indexed")


def _fresh(folder: Path, source: IndexSource, *, verify: bool, report: bool) -> Index | None:
    """The index in a folder if it can be kept; `report` says on standard error why it cannot."""
    if not (folder / HEADER_FILE).is_file():
        return None
    try:
        index = _open_checked(folder, source, verify=verify)
        if source.decode_frames and not index.header.decoded:
            raise StaleIndex(f"the index {folder} was made without decoding the frames")
    except StaleIndex as error:
        if report:
            print(f"makes the index anew: {error}", file=sys.stderr)
        return None
    return index


def _has(index: Index, annotations: AnnotationProvider) -> bool:
    return index.header.annotations.get("fingerprint") == annotations.fingerprint


def _may_write(folder: Path) -> bool:
    """True if files may be made in a folder; one that nobody may write to is left alone by root."""
    return folder.is_dir() and os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time make the index in a folder; the system ends a dead one's turn."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
