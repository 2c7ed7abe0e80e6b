"""The files of checkpoints: which are complete, and whether they are what was written.

    DIR/checkpoints/
      700/                         complete: it has its name, and Orbax's mark
        checksums.json             bytes and CRC-32C of every file below the folders next to it
      800.orbax-checkpoint-tmp/    cut off while it was written; the next run deletes it
      750.damaged/                 moved aside by a run that found it damaged

Nothing here needs the model or a device.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c

CHECKSUMS = "checksums.json"
COMPLETE = "_CHECKPOINT_METADATA"  # Orbax's mark
CUT_OFF = ".orbax-checkpoint-tmp"
ASIDE = ".damaged"
JSON_ITEMS = ("position", "statistics", "tokenizer", "recipe", "logged")
CHUNK_BYTES = 1 << 22
THREADS = min(16, os.cpu_count() or 1)


class SaveFailed(OSError):
    """A checkpoint, or another file of a run, could not be written; those before are intact."""


@contextlib.contextmanager
def writing(path: Path, workdir: Path) -> Iterator[None]:
    """Names the file that could not be written, and what is safe.

    Args:
      path: of the file.
      workdir: the run's directory.

    Raises:
      SaveFailed: the disk is full, or takes no files.
    """
    try:
        yield
    except OSError as error:
        safe = intact(workdir / "checkpoints")
        raise SaveFailed(f"{path} cannot be written: {error.strerror or error}; {safe}") from error


def intact(directory: Path) -> str:
    """Which checkpoint below a `checkpoints` directory a run can go on from, in words."""
    newest = max(steps(directory), default=None)
    return "there is no checkpoint yet" if newest is None else f"checkpoint {newest} is intact"


def steps(directory: str | Path) -> list[int]:
    """Complete checkpoints below a `checkpoints` directory, ascending."""
    return [step for step in _numbered(directory) if is_complete(Path(directory) / str(step))]


def incomplete(directory: str | Path) -> list[int]:
    """Folders with a checkpoint's name that lack the mark of a complete one, ascending."""
    return [step for step in _numbered(directory) if not is_complete(Path(directory) / str(step))]


def cut_off(directory: str | Path) -> dict[Path, int]:
    """Folders of checkpoints that were cut off while they were written, and their steps."""
    found = {path: path.name.partition(CUT_OFF) for path in Path(directory).glob(f"*{CUT_OFF}*")}
    return {path: int(step) for path, (step, _, _) in sorted(found.items()) if step.isdigit()}


def set_aside(directory: str | Path) -> dict[Path, int]:
    """Folders of checkpoints that were moved aside as damaged, and their steps."""
    found = {path: path.name.partition(ASIDE) for path in Path(directory).glob(f"*{ASIDE}*")}
    return {path: int(step) for path, (step, _, _) in sorted(found.items()) if step.isdigit()}


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (folder / COMPLETE).is_file()


def find(directory: str | Path, step: int | None = None) -> Path:
    """The directory of one checkpoint.

    Args:
      directory: a run's directory, its `checkpoints`, or one checkpoint's own.
      step: which; the newest when None.

    Raises:
      FileNotFoundError: when there is none.
    """
    directory = Path(directory).absolute()
    if (directory / "params").is_dir() and step is None:
        return directory
    root = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    known = steps(root)
    if not known:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    if step is not None and step not in known:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; there are {known}")
    return root / str(known[-1] if step is None else step)


def size_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json`, and returns when it is on the disk."""
    files = _files(folder)
    with ThreadPoolExecutor(THREADS) as pool:
        sums = list(pool.map(_crc32c, files.values()))
    table = {
        name: {"bytes": file.stat().st_size, "crc32c": checksum}
        for (name, file), checksum in zip(files.items(), sums, strict=True)
    }
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as stream:
        json.dump(table, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())


def damage(
    folder: Path, items: Sequence[str] = (), *, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """Compares the files of a checkpoint with its checksums, several at a time.

    Args:
      folder: of the checkpoint.
      items: folders in it that are looked at; all when empty.
      share: (i, n) checks every n-th file from the i-th on, the part of one of n processes.

    Returns:
      What is wrong, one line each; nothing when all is well.
    """
    if not is_complete(folder):
        return [f"{COMPLETE} is missing: it was not written to its end"]
    if not (folder / CHECKSUMS).is_file():
        return [f"{CHECKSUMS} is missing"]
    try:
        table = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        table = {name: (row["bytes"], row["crc32c"]) for name, row in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS} is damaged: {error}"]
    wanted = items or ("params", *JSON_ITEMS)
    wrong = [f"{name} is missing" for name in wanted if not (folder / name).is_dir()]

    found = _files(folder)
    names = [
        name
        for name in sorted(table.keys() | found.keys())
        if not items or name.partition("/")[0] in items
    ][share[0] :: share[1]]

    def check(name: str) -> str:
        if name not in table:
            return f"{name} is new"
        if name not in found:
            return f"{name} is missing"
        size, (expected, checksum) = found[name].stat().st_size, table[name]
        if size < expected:
            return f"{name} is cut off: {size} of {expected} bytes"
        return "" if _crc32c(found[name]) == checksum else f"{name} has changed"

    with ThreadPoolExecutor(THREADS) as pool:
        return wrong + [line for line in pool.map(check, names) if line]


def move_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint so that none looks for it, and returns its new name."""
    number, aside = 1, folder.with_name(folder.name + ASIDE)
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}{ASIDE}-{number}")
    return folder.rename(aside)


def _numbered(directory: str | Path) -> list[int]:
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit())


def _files(folder: Path) -> dict[str, Path]:
    """All files of a checkpoint's items, by relative path, sorted."""
    files = [file for file in folder.glob("*/**/*") if file.is_file()]
    return {str(file.relative_to(folder)): file for file in sorted(files)}


def _crc32c(file: Path) -> str:
    checksum = google_crc32c.Checksum()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            checksum.update(chunk)
    return checksum.hexdigest().decode()
