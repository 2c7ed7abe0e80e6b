"""Files of JSON lines, by key: where each line lies is kept, what it says is read when asked for.

A file is read once when it is opened, so that a malformed line is found at once; after that, an
episode costs one seek and one line, whatever the file's size.
"""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Where a line lies in its file: byte offset and length, and its number from 1 on."""

    offset: int
    length: int
    number: int


def scan_lines(path: Path) -> Iterator[tuple[Line, bytes]]:
    """The lines of a file that are not blank, one at a time."""
    offset = 0
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            if data.strip():
                yield Line(offset=offset, length=len(data), number=number), data
            offset += len(data)


def parse_line(data: bytes, where: str) -> dict[str, Any]:
    """A line as a JSON object.

    Raises:
      ValueError: it is none.
    """
    try:
        values = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); is the file complete?") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: should be a JSON object; got {values!r:.80}")
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class LineTable(Generic[Key]):
    """A file of JSON lines by key. `LineTable.read` makes one.

    Attributes:
      path: the file.
      lines: where the line of each key lies.
      digest: SHA-256 of the lines.
    """

    path: Path
    lines: Mapping[Key, Line]
    digest: str

    @classmethod
    def read(cls, path: Path, key_of: Callable[[Mapping[str, Any], str], Key]) -> "LineTable[Key]":
        """Reads the file once.

        Args:
          path: of the file.
          key_of: gives a line's key; takes the parsed line and its name for messages.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: a line is malformed, or two lines have the same key.
        """
        lines: dict[Key, Line] = {}
        digest = hashlib.sha256()
        for line, data in scan_lines(path):
            digest.update(data)
            where = f"{path}, line {line.number}"
            key = key_of(parse_line(data, where), where)
            if key in lines:
                raise ValueError(
                    f"{where}: episode {key!r} is there already, in line {lines[key].number}"
                )
            lines[key] = line
        return cls(path=path, lines=lines, digest=digest.hexdigest())

    def get(self, key: Key) -> tuple[dict[str, Any], str] | None:
        """The parsed line of a key, and its name for messages; None where there is none."""
        line = self.lines.get(key)
        if line is None:
            return None
        where = f"{self.path}, line {line.number}, episode {key!r}"
        with open(self.path, "rb") as file:
            file.seek(line.offset)
            return parse_line(file.read(line.length), where), where
