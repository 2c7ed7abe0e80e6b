"""One pass over a source, shard by shard, that may be interrupted at any time.

    shard 0, 1, ..   each indexed on its own, by any process   <folder>.parts/000000-<key>/
    all of them      merged in order                           <folder>/

A part is an index itself and appears under its name at once, when it is complete. Its key holds all
that it depends on, so that a run that was killed goes on with the shards that lack a part, and the
result is the same bytes for any number of workers and interruptions.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines import storage
from data_pipelines.annotate.readers import AnnotationProvider
from data_pipelines.index.annotations import attach_annotations, checked_annotations
from data_pipelines.index.filters import row_flags
from data_pipelines.index.format import (
    SCHEMA_VERSION,
    Camera,
    EpisodeEntry,
    Header,
    Index,
    SourceFile,
)
from data_pipelines.index.source import IndexSource, ShardFacts
from data_pipelines.index.writer import IndexWriter, put_in_place

SMALL_BYTES = 2**28


def index_source(
    source: IndexSource,
    folder: str | os.PathLike[str],
    *,
    annotations: AnnotationProvider | None = None,
    workers: int | None = None,
    max_bad_fraction: float | None = None,
) -> Index:
    """Indexes a source, going on where an earlier run was interrupted; `build_index` calls this.

    Args:
      source: the split.
      folder: of the index; an older one is replaced.
      annotations: to attach; None for those of the source, if it has some.
      workers, max_bad_fraction: as for `build_index`.
    """
    folder = Path(folder)
    parts = parts_folder(folder)
    shared = _shared(source)
    names = [_part_name(source, shard, shared) for shard in range(len(source.shards))]
    parts.mkdir(parents=True, exist_ok=True)
    for found in parts.iterdir():  # of an interrupted run: unfinished, or of data that changed
        if found.name not in names:
            shutil.rmtree(found)
    _write_parts(source, [parts / name for name in names], workers)
    files, cameras = list(source.files), dict[str, Camera]()
    with IndexWriter(parts / "index") as writer:
        for name, shard in zip(names, source.shards, strict=True):
            part = Index.open(parts / name)
            writer.extend(part)
            for number, file in zip(shard.files, part.header.files, strict=True):
                files[number] = file
            cameras = {**part.header.cameras, **cameras}
        where = f"{source.source}, split {source.split!r}"
        if not writer.counts["rows"]:
            raise ValueError(
                f"{where}: no step to learn from ({writer.counts['empty_episodes']} empty "
                f"episodes, {writer.counts['left_out_episodes']} left out, "
                f"{writer.counts['dropped_steps']} dropped steps)"
            )
        check_bad_fraction(writer.counts, max_bad_fraction, where)
        unseen = sorted(set(source.cameras) - set(cameras))
        if unseen:
            raise ValueError(f"{where}: no frame of camera {', '.join(unseen)} decodes")
        for number in shared:
            files[number] = replace(files[number], checksum=source.checksum(number))
        made = writer.finish(_header(source, tuple(files), cameras))
    if annotations is not None:
        try:
            attach_annotations(made, annotations)
        except ValueError as error:
            raise ValueError(
                f"{annotations.description} cannot be attached: {error}; name others "
                f"(--annotations), or delete {folder}, if it has them, to do without"
            ) from error
    put_in_place(parts / "index", folder)
    shutil.rmtree(parts)
    return Index.open(folder)


def check_bad_fraction(counts: Mapping[str, int], limit: float | None, where: str) -> None:
    """Refuses an index of which more rows than this fraction need a frame that does not decode."""
    bad, rows = counts["flag:bad_frame"], counts["rows"]
    if bad > (limit or 0) * rows:
        raise ValueError(
            f"{where}: {bad} of {rows} rows ({bad / rows:.2%}) need a frame that does not decode; "
            f"allowed {limit or 0:.2%} (--max-bad-fraction)"
        )


def parts_folder(folder: Path) -> Path:
    """Where the parts of an index lie while it is made."""
    return folder.with_name(folder.name + ".parts")


def _shared(source: IndexSource) -> list[int]:
    """The files of no shard, such as metadata: all shards may depend on them."""
    sharded = {number for shard in source.shards for number in shard.files}
    return [number for number in range(len(source.files)) if number not in sharded]


def _part_name(source: IndexSource, shard: int, shared: Sequence[int]) -> str:
    """Names the part of a shard by all that it depends on."""
    files = [source.files[number] for number in (*shared, *source.shards[shard].files)]
    facts = {
        "schema": SCHEMA_VERSION,
        "data": [source.dataset, source.version, source.split],
        "spec": source.spec.fingerprint,
        "cameras": source.cameras,
        "annotations": dict(source.annotations),
        "decode_frames": source.decode_frames,
        "files": [(file.path, file.size, file.stamp) for file in files],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{shard:06d}-{digest[:16]}"


def _is_part(folder: Path) -> bool:
    """True for a part that is whole; one written just before a crash may be damaged."""
    try:
        Index.open(folder).check()
    except (FileNotFoundError, ValueError):
        return False
    return True


def _write_parts(source: IndexSource, folders: Sequence[Path], workers: int | None) -> None:
    """Indexes the shards that have no part yet."""
    missing = [shard for shard, folder in enumerate(folders) if not _is_part(folder)]
    episodes = [shard.episodes for shard in source.shards]
    workers = min(_workers(source, missing) if workers is None else workers, len(missing))
    with tqdm(
        total=sum(episodes),
        initial=sum(episodes) - sum(episodes[shard] for shard in missing),
        desc=f"index {source.dataset} {source.split}",
        unit="episode",
    ) as bar:
        if workers <= 1:
            for shard in missing:
                _write_part(source, shard, folders[shard], bar)
            return
        # Started afresh (spawn), because a fork of a process with threads, as JAX's, may hang.
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_end_with_parent)
        try:
            futures = {
                pool.submit(_write_part, source, shard, folders[shard]): shard for shard in missing
            }
            for future in as_completed(futures):
                future.result()
                bar.update(episodes[futures[future]])
        finally:
            pool.shutdown(cancel_futures=True)


def _workers(source: IndexSource, shards: Sequence[int]) -> int:
    """One process a core, unless there is so little to read that starting them takes longer."""
    files = {number for shard in shards for number in source.shards[shard].files}
    is_small = sum(source.files[number].size for number in files) < SMALL_BYTES
    return 1 if is_small else len(os.sched_getaffinity(0))


def _write_part(
    source: IndexSource, shard: int, folder: Path, bar: "tqdm[Any] | None" = None
) -> None:
    """Indexes one shard."""
    numbers = source.shards[shard].files
    with IndexWriter(folder, durable=False) as writer:
        episodes = source.episodes(shard)
        while True:
            try:
                entry = next(episodes)
            except StopIteration as end:
                facts: ShardFacts = end.value
                break
            writer.add(_checked(source, entry))
            if bar is not None:
                bar.update()
        files = tuple(
            replace(source.files[number], checksum=checksum)
            for number, checksum in zip(numbers, facts.checksums, strict=True)
        )
        writer.finish(_header(source, files, facts.cameras))


def _checked(source: IndexSource, entry: EpisodeEntry) -> EpisodeEntry:
    """An episode with all its flags and with boxes that lie inside the image."""
    where = f"{storage.join(source.source, source.files[entry.file].path)}, record {entry.record}"
    for name, values in (("actions", entry.actions), ("states", entry.states)):
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            raise ValueError(f"{where}, step {entry.frame[bad[0]]}: the {name} are not finite")
    if entry.annotations:
        annotations = checked_annotations(entry.annotations, entry.frame.tolist(), where)
        entry = replace(entry, annotations=annotations)
    return replace(entry, flags=entry.flags | row_flags(source.spec, entry))


def _header(
    source: IndexSource, files: tuple[SourceFile, ...], cameras: Mapping[str, Camera]
) -> Header:
    return Header(
        dataset=source.dataset,
        data_name=source.own_name,
        version=source.version,
        split=source.split,
        source=source.source,
        spec=source.spec,
        cameras={camera: cameras[camera] for camera in source.cameras if camera in cameras},
        files=files,
        annotations=source.annotations,
        decoded=source.decode_frames,
    )


def _end_with_parent() -> None:
    """In a worker: ends it when the process that started it is gone, even if that was killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # a worker has one
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
