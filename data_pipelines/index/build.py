"""Makes, opens and checks the index of a dataset's split.

    /data/bridge_dataset/1.0.0/lara_index/train         beside the data, where one may write there
    ~/.cache/lara_jax/index/bridge_dataset-1.0.0-<hash>/train     of a remote or read-only directory

    build_index     one pass over the files, unless the index there is fresh   (`lara data index`)
    open_index      refuses an index that is stale or of other data, and says why
    open_or_build   what training calls: makes an index only where there is none

One process at a time makes an index; others wait for it and then find it made.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from data_pipelines import storage
from data_pipelines.annotate.readers import AnnotationProvider, open_provider
from data_pipelines.index.annotations import attach_annotations
from data_pipelines.index.format import HEADER_FILE, Index
from data_pipelines.index.parts import check_bad_fraction, index_source, parts_folder
from data_pipelines.index.source import IndexSource, Shard, ShardFacts
from data_pipelines.index.writer import recover, write_header
from data_pipelines.lerobot import is_lerobot
from data_pipelines.oxe.registry import load_definitions, spec_named
from data_pipelines.rlds.directory import Directory
from data_pipelines.rlds.source import RldsSource

__all__ = [
    "IndexSource",
    "Shard",
    "ShardFacts",
    "StaleIndex",
    "attach_annotations",
    "build_index",
    "cache_folder",
    "index_folder",
    "index_source",
    "locked",
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
    """The splits of a TFDS version directory or of a LeRobot data set.

    Of a directory that was converted to step records, those that have an index; of the folder of an
    index, the one that it is of.
    """
    place = storage.absolute(path_or_url)
    if is_lerobot(place):  # imported here, as it needs an extra
        from data_pipelines.lerobot.meta import Metadata

        return tuple(Metadata.read(place).splits)
    if storage.exists(storage.join(place, HEADER_FILE)):
        return (Index.open(place).header.split,)
    if not _is_described(place) and storage.exists(storage.join(place, SIDECAR)):
        return _indexed_splits(place)
    return tuple(Directory.read(place).splits)


def _indexed_splits(place: str) -> tuple[str, ...]:
    """The splits that have an index beside the data."""
    folder = storage.join(place, SIDECAR)
    names = storage.list_folders(folder)
    return tuple(n for n in names if storage.exists(f"{folder}/{n}/{HEADER_FILE}"))


def open_source(
    path_or_url: str | os.PathLike[str],
    split: str,
    *,
    name: str | None = None,
    definitions: str | os.PathLike[str] | None = None,
    decode_frames: bool = False,
    flag_bad_frames: bool = False,
) -> IndexSource:
    """A split of a TFDS version directory or of a LeRobot data set.

    Args:
      path_or_url: where it lies.
      split: such as "train".
      name: of the dataset, whatever the files call it; None for what they say.
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
            name=name,
            definitions=datasets,
            decode_frames=decode_frames,
            flag_bad_frames=flag_bad_frames,
        )
    return RldsSource.read(
        place,
        split,
        name=name,
        definitions=datasets,
        decode_frames=decode_frames,
        flag_bad_frames=flag_bad_frames,
    )


def index_command(
    path_or_url: str | os.PathLike[str],
    *,
    name: str | None,
    definitions: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None = None,
) -> str:
    """The command that makes a dataset's index, for messages; `out` as of `--out`."""
    options = {"name": name, "definitions": definitions, "out": out}
    given = "".join(f" --{key} {os.fspath(value)}" for key, value in options.items() if value)
    return f"lara data index {os.fspath(path_or_url)}{given}"


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
    return cache_folder() / "index" / f"{name}-{digest}" / split


def cache_folder() -> Path:
    """Where indexes lie that cannot lie beside their data."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "lara_jax")


def open_index(
    path_or_url: str | os.PathLike[str],
    split: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    definitions: str | os.PathLike[str] | None = None,
    verify: bool = False,
    out: str | os.PathLike[str] | None = None,
) -> Index:
    """Opens the index of a dataset's split, if it is one of this data as it is now.

    Args:
      path_or_url: a TFDS version directory or a LeRobot data set.
      split: such as "train".
      folder: of the index; None for `index_folder`.
      name: of the dataset, whatever the files call it; None for what they say.
      definitions: a TOML file with datasets besides the built-in ones.
      verify: read the index's arrays and all files of the source, and compare their checksums.
      out: the `--out` that makes the index in `folder`, for messages; None for the folder above.

    Raises:
      FileNotFoundError: there is no index, or no such dataset.
      StaleIndex: it has another schema version, the source's files or the dataset's definition have
        changed since, or it is damaged. The message says which.
      ValueError: it is the index of other data, or there is no such split.
    """
    source = open_source(path_or_url, split, name=name, definitions=definitions)
    usual = index_folder(path_or_url, split)
    folder = Path(folder) if folder is not None else usual
    if out is None and folder != usual:
        out = folder.parent
    command = index_command(
        path_or_url, name=name or source.spec.name, definitions=definitions, out=out
    )
    if not (folder / HEADER_FILE).is_file():
        raise FileNotFoundError(
            f"{os.fspath(path_or_url)}, split {split!r}, has no index at {folder}: run `{command}`"
        )
    try:
        return _open_checked(folder, source, verify=verify)
    except StaleIndex as error:
        raise StaleIndex(f"{error}: run `{command}` again") from error


def build_index(
    path_or_url: str | os.PathLike[str],
    split: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
    definitions: str | os.PathLike[str] | None = None,
    annotations: AnnotationProvider | None = None,
    workers: int | None = None,
    decode_frames: bool = False,
    max_bad_fraction: float | None = None,
    verify: bool = False,
) -> Index:
    """Makes the index of a dataset's split, or opens the one there is if it is fresh.

    Args:
      path_or_url, split, folder, name, definitions, verify: as for `open_index`.
      annotations: reasoning to take instead of the records' own; None for what was attached to
        the index that is there, if it has to be made anew.
      workers: processes; None for one a core, or one alone for small files. The result does not
        depend on it.
      decode_frames: decode every frame; one that does not decode is an error.
      max_bad_fraction: with `decode_frames`: flag rows that need such a frame, and fail only if
        they are more than this fraction of all rows.

    Raises:
      FileNotFoundError: there is no such dataset, or a file of it is missing.
      ValueError: the folder holds the index of other data; or of these, with annotations attached
        from files that are gone; or the data are bad, in which case the message names file, record
        and step.
      OSError: a file of the index cannot be written, or one of a remote source not be read.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if max_bad_fraction is not None and not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction}; allowed 0 to 1")
    if max_bad_fraction is not None and not decode_frames:
        raise ValueError("max_bad_fraction needs decode_frames: nothing else finds bad frames")
    source = open_source(
        path_or_url,
        split,
        name=name,
        definitions=definitions,
        decode_frames=decode_frames,
        flag_bad_frames=max_bad_fraction is not None,
    )
    folder = Path(folder) if folder is not None else index_folder(path_or_url, split)
    index = _fresh(folder, source, verify=verify)
    if index is None or parts_folder(folder).exists():
        with locked(folder):
            index = _fresh(folder, source, verify=verify, report=True)
            if index is None:
                index = index_source(
                    source,
                    folder,
                    annotations=annotations or _attached(folder),
                    workers=workers,
                    max_bad_fraction=max_bad_fraction,
                )
            shutil.rmtree(parts_folder(folder), ignore_errors=True)
    if decode_frames:
        check_bad_fraction(index.header.counts, max_bad_fraction, str(folder))
    if annotations is None or _has(index, annotations):
        return index
    with locked(folder):
        index = Index.open(folder, source=source.source)
        if not _has(index, annotations):
            attach_annotations(index, annotations)
    return Index.open(folder, source=source.source, spec=source.spec)


def open_or_build(
    path_or_url: str | os.PathLike[str],
    split: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    name: str | None = None,
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
        if (Path(place) / HEADER_FILE).is_file():
            return _open_by_itself(Path(place), split, name, definitions)
        if (Path(place) / SIDECAR).is_dir() and not _is_described(place):
            splits = _indexed_splits(place)
            if split not in splits:
                raise ValueError(f"{place} has no split {split!r}; it has: {', '.join(splits)}")
            beside = Path(place) / SIDECAR / split
            return _open_by_itself(beside, split, name, definitions, source=place)
    folder = Path(folder) if folder is not None else index_folder(path_or_url, split)
    if (folder / HEADER_FILE).is_file():
        return open_index(path_or_url, split, folder, name=name, definitions=definitions)
    return build_index(
        path_or_url, split, folder, name=name, definitions=definitions, workers=workers
    )


def _open_by_itself(
    folder: Path,
    split: str,
    name: str | None,
    definitions: str | os.PathLike[str] | None,
    source: str | None = None,
) -> Index:
    """An index without a description of its data; their files are checked where they are there."""
    index = Index.open(folder, source=source)
    header = index.header
    if header.split != split:
        raise ValueError(f"{folder} is the index of split {header.split!r}, not of {split!r}")
    if name is not None and name != header.dataset:
        datasets = load_definitions(definitions)[0] if definitions is not None else None
        spec = spec_named(name, datasets)
        if spec.fingerprint != header.spec.fingerprint:
            raise ValueError(
                f"{folder} is the index of dataset {header.dataset!r}, whose definition is not "
                f"that of {name!r}"
            )
        index = Index.open(folder, source=source, spec=spec)
    try:
        if not storage.exists(index.source):
            return index
        found = storage.facts(index.source, [file.path for file in header.files])
    except (OSError, ValueError) as error:
        print(f"{folder}: not compared with its files, {error}", file=sys.stderr)
        return index
    sizes = {
        f.path: None if facts is None else facts.size
        for f, facts in zip(header.files, found, strict=True)
    }
    _check_sizes(index, sizes)
    return index


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
    now = {file.path: file for file in source.files}
    # Data may be read by another definition than before, but then their files are the same.
    renamed = [] if now.keys() == {file.path for file in header.files} else ["dataset"]
    for name in (*renamed, "version", "split"):
        found, wanted = getattr(header, name), getattr(source, name)
        if found != wanted:
            raise ValueError(
                f"{folder} is the index of other data: {name} {found!r}, asked for {wanted!r}; "
                f"choose another folder or remove it"
            )
    stale = f"the index {folder} is stale"
    if header.spec.fingerprint != source.spec.fingerprint:
        raise StaleIndex(
            f"{stale}: the definition of dataset {header.spec.name!r} has changed "
            f"({header.spec.fingerprint}, now {source.spec.name!r}, {source.spec.fingerprint})"
        )
    if set(header.cameras) != set(source.cameras):
        raise StaleIndex(
            f"{stale}: it has the cameras {sorted(header.cameras)}, "
            f"the data {sorted(source.cameras)}"
        )
    _check_sizes(index, {path: file.size for path, file in now.items()})
    if verify:
        try:
            index.check()
        except ValueError as error:
            raise StaleIndex(str(error)) from error
    _check_content(index, source, every=verify)
    return Index.open(folder, source=source.source, spec=source.spec)


def _check_sizes(index: Index, now: Mapping[str, int | None]) -> None:
    """Refuses an index whose files are not there or have other sizes."""
    known = {file.path: file.size for file in index.header.files}
    for name in sorted(known.keys() | now.keys()):
        if known.get(name) != now.get(name):
            raise StaleIndex(
                f"the index {index.folder} is stale: {storage.join(index.source, name)} has "
                f"{now.get(name)} bytes, it had {known.get(name)} (None: there is no such file)"
            )


def _check_content(index: Index, source: IndexSource, *, every: bool) -> None:
    """Compares checksums: of every file, or of those that seem to have been touched."""
    known = {file.path: file for file in index.header.files}
    touched = [
        number
        for number, file in enumerate(source.files)
        if every or _seems_touched(known[file.path].stamp, file.stamp)
    ]
    label = f"verify {source.dataset} {source.split}"
    for number in tqdm(touched, desc=label, unit="file", disable=not touched):
        file = source.files[number]
        if known[file.path].checksum != source.checksum(number):
            path = storage.join(source.source, file.path)
            raise StaleIndex(
                f"the index {index.folder} is stale: {path} holds something else than what was "
                f"indexed"
            )
    stamps = {source.files[number].path: source.files[number].stamp for number in touched}
    if any(known[path].stamp != stamp for path, stamp in stamps.items()):
        _restamp(index, stamps)


def _seems_touched(before: str, now: str) -> bool:
    """True if two stamps differ, of one kind: a local copy of a bucket is not compared with it."""
    return before != now and before.partition(" ")[0] == now.partition(" ")[0]


def _restamp(index: Index, stamps: Mapping[str, str]) -> None:
    """Writes new stamps down, so that the files are read but once; where that may be done."""
    header = index.header
    files = tuple(replace(f, stamp=stamps.get(f.path, f.stamp)) for f in header.files)
    try:
        write_header(index.folder, replace(header, files=files))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def _fresh(
    folder: Path, source: IndexSource, *, verify: bool, report: bool = False
) -> Index | None:
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


def _attached(folder: Path) -> AnnotationProvider | None:
    """What was attached to the index in a folder, from its files as they are now."""
    file = folder / HEADER_FILE
    if not file.is_file():
        return None
    try:
        annotations = json.loads(file.read_text(encoding="utf-8"))["annotations"]
    except (ValueError, KeyError, TypeError):
        print(f"{file} is damaged: attach annotations again, if it had some", file=sys.stderr)
        return None
    if "from" not in annotations:
        return None
    try:
        provider = open_provider(annotations["from"])
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"the index {folder} has to be made anew, but has annotations attached that cannot be "
            f"read: {error}; name others (--annotations), or delete {folder} to do without"
        ) from error
    if provider.fingerprint != annotations.get("fingerprint"):
        print(f"{annotations['from']} has changed since it was attached", file=sys.stderr)
    return provider


def _has(index: Index, annotations: AnnotationProvider) -> bool:
    return index.header.annotations.get("fingerprint") == annotations.fingerprint


def _may_write(folder: Path) -> bool:
    """True if files may be made in a folder; one that nobody may write to is left alone by root."""
    return folder.is_dir() and os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time make the index in a folder; the system ends a dead one's turn."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        recover(folder)
        yield
