"""Writes an index, episode by episode: the mirror image of `format`.

An index appears under its name at once, when it is complete; until then its files lie in a hidden
folder beside it, so that whatever interrupts a writer leaves no half of an index.
"""

import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np

from data_pipelines.index.format import (
    ANNOTATION,
    EPISODE,
    FLAGS,
    HEADER_FILE,
    ROW,
    ArrayInfo,
    EpisodeEntry,
    Header,
    Index,
    frames_file,
)
from lara_jax.tokenizers.prompt import Annotation


def put_in_place(made: Path, folder: Path) -> None:
    """Gives a finished folder its name, instead of an older one of that name."""
    old = _replaced(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)  # a reader that has the old one mapped keeps it
    os.replace(made, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undoes what killed writers of a folder have left; no other process may be writing it.

    An index that was being replaced gets its name back, and unfinished ones are deleted.
    """
    if _replaced(folder).exists() and not folder.exists():
        os.replace(_replaced(folder), folder)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*"):
        if left.is_dir():
            shutil.rmtree(left)


def _replaced(folder: Path) -> Path:
    """Where an older index lies while a new one gets its name."""
    return folder.with_name(f".{folder.name}.old")


def write_header(folder: Path, header: Header) -> None:
    """Writes the header of an index; one that is there is replaced at once."""
    file = folder / f".{HEADER_FILE}.{secrets.token_hex(8)}"
    try:
        with _naming(file):
            file.write_text(json.dumps(header.to_dict(), indent=1), encoding="utf-8")
            os.replace(file, folder / HEADER_FILE)
    finally:
        file.unlink(missing_ok=True)


class IndexWriter:
    """Writes an index, episode by episode; use it as a context and call `finish` at the end.

    The index appears under its name at once, when it is complete.
    """

    def __init__(self, folder: str | os.PathLike[str], *, durable: bool = True) -> None:
        """Makes a folder for it beside its place.

        Args:
          folder: its place.
          durable: wait until the arrays are on the disk before they get their name there.
        """
        self._durable = durable
        self.folder = Path(folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        # Others may read an index: not a folder of `tempfile`, which is for its owner alone.
        self._partial = self.folder.with_name(f".{self.folder.name}.{secrets.token_hex(8)}")
        self._partial.mkdir()
        self._arrays: dict[str, _ArrayFile] = {}
        self._kept: dict[str, ArrayInfo] = {}
        self._texts = _TextFile(self, "texts")
        self._annotation_texts = _TextFile(self, "annotation_texts")
        self.counts = dict.fromkeys(
            (
                "episodes", "rows", "stored_steps", "dropped_steps", "empty_episodes",
                "left_out_episodes", "boxes",
            ),
            0,
        )  # fmt: skip
        self.counts |= {f"flag:{name}": 0 for name in FLAGS}

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for array in self._arrays.values():
            # After a full disk, closing tries to write once more what is given up here.
            with suppress(OSError):
                array.file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, entry: EpisodeEntry) -> None:
        """Appends an episode; one without rows is only counted."""
        counts, rows, stored = self.counts, len(entry.actions), entry.stored_steps
        first_frame, number = counts["stored_steps"], counts["episodes"]
        counts["dropped_steps"] += stored - rows
        if not rows:
            counts["left_out_episodes" if entry.left_out else "empty_episodes"] += 1
            return
        success = -1 if entry.success is None else int(entry.success)
        key = self._texts.number(entry.key)
        episode = (
            counts["rows"], rows, first_frame, stored, entry.file, entry.record, self._seen, key,
            success,
        )  # fmt: skip
        self.append("episodes.bin", np.array([episode], EPISODE))
        table = np.zeros(rows, ROW)
        table["episode"], table["frame"], table["next_frame"] = (
            number,
            entry.frame,
            entry.next_frame,
        )
        table["instruction"] = [self._texts.number(text) for text in entry.instructions]
        table["flags"] = entry.flags
        self.append("rows.bin", table)
        self.append("actions.bin", np.ascontiguousarray(entry.actions, "<f4"))
        self.append("states.bin", np.ascontiguousarray(entry.states, "<f4"))
        for camera, frames in entry.frames.items():
            self.append(frames_file(camera), frames)
        self.add_annotations(entry.annotations, rows)
        counts["episodes"] += 1
        counts["rows"] += rows
        counts["stored_steps"] += stored
        for name, bit in FLAGS.items():
            counts[f"flag:{name}"] += int(np.count_nonzero(table["flags"] & bit))

    def extend(
        self,
        part: Index,
        *,
        episodes: np.ndarray | None = None,
        frames: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Appends all episodes of another index, as `add` would; `file` stays as it is.

        Args:
          part: the other index.
          episodes, frames: instead of the other's own: the same episodes, the same stored steps,
            but in other files.
        """
        counts = self.counts
        if part.header.counts["episodes"]:
            episodes = (part.episodes if episodes is None else episodes).copy()
            rows = part.rows.copy()
            texts = self._texts.numbers_of(part.texts)
            episodes["first_row"] += counts["rows"]
            episodes["first_frame"] += counts["stored_steps"]
            episodes["number"] += self._seen
            episodes["key"] = texts[episodes["key"]]
            rows["episode"] += counts["episodes"]
            rows["instruction"] = texts[rows["instruction"]]
            self.append("episodes.bin", episodes)
            self.append("rows.bin", rows)
            for name in ("actions.bin", "states.bin"):
                self.append(name, part.array(name))
            for camera, places in (part.frames if frames is None else frames).items():
                self.append(frames_file(camera), places)
            annotations = part.array("annotations.bin").copy()
            words = self._annotation_texts.numbers_of(part.annotation_texts)
            some = (annotations["subtask"] | annotations["motion"] | annotations["boxes"]) != 0
            annotations["first_box"][some] += counts["boxes"]
            for name in ("subtask", "motion"):
                annotations[name] = words[annotations[name]]
            self.append("annotations.bin", annotations)
            self.append("boxes.bin", part.array("boxes.bin"))
        for name, count in part.header.counts.items():
            counts[name] += count

    def keep(self, index: Index, names: Iterable[str]) -> None:
        """Takes array files of another index as they are, and its texts and its counts.

        The counts of annotations are not taken; `add_annotations` makes them anew.
        """
        for name in names:
            file = self._partial / name
            try:
                os.link(index.folder / name, file)
            except OSError:  # a file system without hard links
                with _naming(file):
                    shutil.copyfile(index.folder / name, file)
            self._kept[name] = index.header.arrays[name]
        self._texts.numbers_of(index.texts)
        self.counts |= {**index.header.counts, "boxes": 0, "flag:no_annotation": 0}

    @property
    def _seen(self) -> int:
        """How many episodes there were so far, those without rows, too."""
        names = ("episodes", "empty_episodes", "left_out_episodes")
        return sum(self.counts[name] for name in names)

    def append(self, name: str, values: np.ndarray) -> None:
        """Adds entries to an array file."""
        if name not in self._arrays:
            self._arrays[name] = _ArrayFile(self._partial / name, values)
        self._arrays[name].append(values)

    def finish(self, header: Header) -> Index:
        """Closes the files and puts the index in its place, instead of an older one.

        Args:
          header: all but `counts` and `arrays`, which the writer knows.
        """
        self._texts.finish()
        self._annotation_texts.finish()
        arrays = self._kept | {
            name: array.finish(durable=self._durable) for name, array in self._arrays.items()
        }
        header = replace(header, counts=self.counts, arrays=dict(sorted(arrays.items())))
        write_header(self._partial, header)
        put_in_place(self._partial, self.folder)
        return Index.open(self.folder)

    def add_annotations(self, annotations: Sequence[Annotation | None], rows: int) -> None:
        """The reasoning of an episode's rows, or () for none; absent ones are entries of zeros."""
        table = np.zeros(rows, ANNOTATION)
        for row, annotation in enumerate(annotations):
            if annotation is None:
                continue
            boxes = np.array(annotation.boxes, "<f4").reshape(-1, 4)
            table[row] = (
                self._annotation_texts.number(annotation.subtask),
                self._annotation_texts.number(annotation.motion),
                self.counts["boxes"],
                len(boxes),
            )
            self.counts["boxes"] += len(boxes)
            self.append("boxes.bin", boxes)
        self.append("annotations.bin", table)
        self.append("boxes.bin", np.zeros((0, 4), "<f4"))


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Lets the error of a write, such as a full disk, name the file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


class _ArrayFile:
    """An array file that grows: its length, dtype and running checksum."""

    def __init__(self, path: Path, like: np.ndarray) -> None:
        self.path = path
        self.file = open(path, "wb")  # noqa: SIM115  # closed by `finish` or by the writer
        self.tail, self.dtype, self.length = like.shape[1:], like.dtype, 0
        self.crc = google_crc32c.Checksum()

    def append(self, values: np.ndarray) -> None:
        if values.shape[1:] != self.tail or values.dtype != self.dtype:
            raise ValueError(
                f"{self.path}: entries of {values.dtype}{values.shape[1:]}, "
                f"those before are {self.dtype}{self.tail}"
            )
        data = values.tobytes()
        with _naming(self.path):
            self.file.write(data)
        self.crc.update(data)
        self.length += len(values)

    def finish(self, *, durable: bool) -> ArrayInfo:
        with _naming(self.path):
            self.file.flush()
            if durable:
                os.fsync(self.file.fileno())
            self.file.close()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        crc = int.from_bytes(self.crc.digest(), "big")
        return ArrayInfo(shape=(self.length, *self.tail), dtype=descr, crc=crc)


class _TextFile:
    """Distinct strings by number; number 0 is the empty one."""

    def __init__(self, writer: IndexWriter, name: str) -> None:
        self.writer, self.name = writer, name
        self.numbers: dict[str, int] = {"": 0}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))

    def numbers_of(self, texts: Iterable[str]) -> np.ndarray:
        """The numbers here of another index's texts: int32[n]."""
        return np.array([self.number(text) for text in texts], np.int32)

    def finish(self) -> None:
        encoded = [text.encode("utf-8") for text in self.numbers]
        ends = np.cumsum([len(text) for text in encoded]).astype("<i8")
        self.writer.append(f"{self.name}.bin", np.frombuffer(b"".join(encoded), np.uint8))
        self.writer.append(f"{self.name}.ends.bin", ends)


def write_index(
    folder: str | os.PathLike[str], header: Header, entries: Iterable[EpisodeEntry]
) -> Index:
    """Writes all episodes in order; see `IndexWriter`."""
    with IndexWriter(folder) as writer:
        for entry in entries:
            writer.add(entry)
        return writer.finish(header)
