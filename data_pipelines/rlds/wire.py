"""A serialised `tf.train.Example`, read where it lies: no copy, and nothing that is not asked for.

An Example is a map from keys to lists. On the wire every field is a tag (number << 3 | type), for
all types here but two followed by a length and so many bytes::

    Example   1: Features   1: entry   1: key  "steps/observation/image_0"
                                       2: Feature   1: BytesList   1: value   1: value ...
                                                  | 2: FloatList   1: packed float32
                                                  | 3: Int64List   1: packed varints

`scan` walks over the entries and notes where each list lies; `ListView.numbers` then is a view of
the record, and `ListView.spans` says where in the record each byte string (each JPEG) lies, which
is all that an index keeps of it. Parsing the same with protobuf costs ten times as much.

Source: protobuf.dev/programming-guides/encoding; tensorflow/core/example/example.proto.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = {1: "bytes_list", 2: "float_list", 3: "int64_list"}
# Wire types: a varint, 8 bytes, a length and so many bytes, 4 bytes.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


def scan(record: bytes) -> "dict[str, ListView]":
    """The lists of an Example by key.

    Args:
      record: the serialised Example.

    Raises:
      ValueError: it is damaged, or no Example.
    """
    lists: dict[str, ListView] = {}
    for start, end in _messages(record, 0, len(record), 1):
        for entry_start, entry_end in _messages(record, start, end, 1):
            key, feature = "", (entry_end, entry_end)
            for number, wire, at, stop in _fields(record, entry_start, entry_end):
                if number == 1 and wire == _BYTES:
                    key = record[at:stop].decode("utf-8")  # UnicodeDecodeError is a ValueError
                elif number == 2 and wire == _BYTES:
                    feature = (at, stop)
            lists[key] = _list(record, *feature)
    return lists


class ListView(NamedTuple):
    """One list of a record.

    Attributes:
      record: the serialised Example.
      kind: "bytes_list", "float_list", "int64_list", or "" for a feature without values.
      start, end: where the list's message lies in the record.
    """

    record: bytes
    kind: str
    start: int
    end: int

    def numbers(self) -> np.ndarray:
        """float32[n] or int64[n]; a packed list of floats is a view of the record.

        Raises:
          ValueError: the list is damaged, or not of numbers.
        """
        if self.kind == "":
            return np.zeros(0, np.float32)
        if self.kind == "bytes_list":
            raise ValueError("a bytes_list holds no numbers")
        of_floats = self.kind == "float_list"
        runs, unpacked = [], _FIXED32 if of_floats else _VARINT
        for number, wire, at, stop in _fields(self.record, self.start, self.end):
            if number != 1:
                continue
            if wire not in (_BYTES, unpacked):
                raise ValueError(f"a value of a {self.kind} has wire type {wire}")
            if of_floats and (stop - at) % 4:
                raise ValueError(f"a float_list has {stop - at} bytes, no multiple of 4")
            runs.append(
                np.frombuffer(self.record, "<f4", (stop - at) // 4, at)
                if of_floats
                else _varints(np.frombuffer(self.record, np.uint8, stop - at, at))
            )
        if len(runs) == 1:
            return runs[0]
        return np.concatenate([np.zeros(0, np.float32 if of_floats else np.int64), *runs])

    def spans(self) -> tuple[list[int], list[int]]:
        """Offset in the record and length of each byte string.

        Raises:
          ValueError: the list is damaged, or not of byte strings.
        """
        if self.kind not in ("", "bytes_list"):
            raise ValueError(f"a {self.kind} holds no byte strings")
        record, at, end = self.record, self.start, self.end
        offsets: list[int] = []
        lengths: list[int] = []
        try:
            while at < end:
                if record[at] != 0x0A:
                    raise ValueError(f"byte {at} of the record is no tag of a bytes_list's value")
                # `_varint` without the call: this is the innermost loop of an index build.
                length = record[at + 1]
                at += 2
                if length > 127:
                    length &= 127
                    shift, byte = 7, 128
                    while byte > 127:
                        byte = record[at]
                        length |= (byte & 127) << shift
                        shift += 7
                        at += 1
                offsets.append(at)
                lengths.append(length)
                at += length
        except IndexError:
            at = end + 1
        if at != end:
            raise ValueError("a bytes_list ends inside a value")
        return offsets, lengths

    def strings(self) -> list[bytes]:
        """Copies of the byte strings."""
        return [
            self.record[offset : offset + length]
            for offset, length in zip(*self.spans(), strict=True)
        ]


def _list(record: bytes, start: int, end: int) -> ListView:
    """The list that a Feature holds; the last one, should there be several."""
    found = ListView(record, "", end, end)
    for number, wire, at, stop in _fields(record, start, end):
        if number in KINDS and wire == _BYTES:
            found = ListView(record, KINDS[number], at, stop)
    return found


def _messages(record: bytes, start: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
    """Where the messages lie that are fields of this number."""
    for number, wire, at, stop in _fields(record, start, end):
        if number == wanted:
            if wire != _BYTES:
                raise ValueError(f"field {number} at byte {at} is no message (wire type {wire})")
            yield at, stop


def _fields(record: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message: number, wire type, and where the value lies."""
    while at < end:
        tag, at = _varint(record, at)
        wire, stop = tag & 7, at
        if wire == _BYTES:
            length, at = _varint(record, at)
            stop = at + length
        elif wire == _VARINT:
            _, stop = _varint(record, at)
        elif wire in (_FIXED32, _FIXED64):
            stop = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"byte {at} follows a tag of the unknown wire type {wire}")
        if stop > end:
            raise ValueError(f"the value at byte {at} ends at {stop}, its message at {end}")
        yield tag >> 3, wire, at, stop
        at = stop


def _varint(record: bytes, at: int) -> tuple[int, int]:
    """A number in groups of 7 bits, the lowest first, and where it ends."""
    if at < len(record) and record[at] < 128:
        return record[at], at + 1
    value = shift = 0
    for byte in record[at : at + _MAX_VARINT_BYTES]:
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"a number does not end before byte {at}")


def _varints(data: np.ndarray) -> np.ndarray:
    """Numbers one after the other: uint8[n] to int64[m]."""
    last = data < 128
    if last.all():
        return data.astype(np.int64)
    if not last[-1]:
        raise ValueError("an int64_list ends inside a number")
    ends = np.flatnonzero(last) + 1
    lengths = np.diff(ends, prepend=0)
    if lengths.max() > _MAX_VARINT_BYTES:
        raise ValueError(f"a number of an int64_list has {lengths.max()} bytes")
    place = np.arange(len(data)) - np.repeat(ends - lengths, lengths)
    bits = (data & 127).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, ends - lengths).view(np.int64)
