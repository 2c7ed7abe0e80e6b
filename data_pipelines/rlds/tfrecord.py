"""TFRecord files: every record in order, or where each record lies and then one by its number.

A TFRecord file is a run of records with nothing between them; every number is little-endian::

    [ length ][ masked CRC of length ][ payload      ][ masked CRC of payload ]
      uint64     uint32                 length bytes     uint32

So a file is indexed by reading 12 bytes per record and skipping the payload, and afterwards any
record is one read. Both checksums are CRC-32C, rotated and offset ("masked") so that a CRC of data
that holds CRCs stays meaningful. The file may be a local one or a URL (`data_pipelines.storage`).

Source: tensorflow/core/lib/io/record_writer.h and tensorflow/core/lib/hash/crc32c.h.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from data_pipelines import storage

HEADER_BYTES = 12
FOOTER_BYTES = 4


def masked_crc(data: bytes) -> int:
    """The CRC-32C of `data` in TFRecord's masked form, in [0, 2**32)."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class Record(NamedTuple):
    """One record: its number, where its payload begins in the file, the payload, its stored CRC."""

    number: int
    offset: int
    payload: bytes
    crc: int


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Every record of a file in order, both checksums checked; reads from start to end.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or corrupt; names the file and the record.
    """
    number = offset = 0
    with storage.open_read(path) as file, storage.naming(path):
        while header := file.read(HEADER_BYTES):
            where = where_record(path, number)
            length = _payload_length(header, where)
            payload = file.read(length)
            footer = file.read(FOOTER_BYTES)
            if len(payload) < length or len(footer) < FOOTER_BYTES:
                end = offset + HEADER_BYTES + length + FOOTER_BYTES
                found = offset + HEADER_BYTES + len(payload) + len(footer)
                raise ValueError(
                    f"{where}: truncated, the record ends at byte {end}, the file at {found}"
                )
            stored = _check_payload(payload, footer, where)
            yield Record(number, offset + HEADER_BYTES, payload, stored)
            offset += HEADER_BYTES + length + FOOTER_BYTES
            number += 1


def checksum_of(crcs: Iterable[int]) -> str:
    """A file's checksum: the CRC-32C over its records' stored CRCs, 8 hexadecimal digits."""
    return f"{google_crc32c.value(np.array(list(crcs), '<u4').tobytes()):08x}"


def stored_crcs(path: str | os.PathLike[str]) -> list[int]:
    """The CRC that each record carries of its payload; reads neither payloads nor checks them."""
    file = TFRecordFile(path)
    ends = (file.records[:, 0] + HEADER_BYTES + file.records[:, 1]).tolist()
    with storage.open_read(path) as opened, storage.naming(path):
        return [struct.unpack("<I", _read_at(opened, end, FOOTER_BYTES))[0] for end in ends]


def where_record(path: str | os.PathLike[str], number: int) -> str:
    """Names a record in messages: "/data/x.tfrecord-00000-of-00001, record 3"."""
    return f"{path}, record {number}"


class TFRecordFile:
    """One TFRecord file, indexed when it is opened and then read by record number.

    The file is opened anew for each read: a dataset may have more shards than a process may have
    open files, and the object can be shared by threads and pickled.

    Attributes:
      path: the file; a Path where it is local, a URL elsewhere.
      records: int64[N, 2], the byte offset of each record's header and the byte length of its
        payload.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Finds every record of the file, checking the lengths' checksums but not the payloads'.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is truncated or a length is corrupt; names the file and the record.
        """
        self.path: Path | str = storage.locate(path)
        self.records = self._scan()

    def __len__(self) -> int:
        return len(self.records)

    def where(self, record: int) -> str:
        """Names a record in messages: "/data/x.tfrecord-00000-of-00001, record 3"."""
        return where_record(self.path, record)

    def read(self, record: int) -> bytes:
        """The payload of one record, both checksums checked.

        Args:
          record: its number, in [0, len(self)).

        Raises:
          IndexError: there is no such record.
          ValueError: the file changed, is truncated or corrupt; names the file and the record.
        """
        if not 0 <= record < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, no record {record}")
        offset, length = (int(number) for number in self.records[record])
        size = HEADER_BYTES + length + FOOTER_BYTES
        where = self.where(record)
        with storage.open_read(self.path) as file, storage.naming(self.path):
            block = _read_at(file, offset, size)
        if len(block) < size:
            raise ValueError(f"{where}: truncated, {len(block)} of {size} bytes are left")
        if _payload_length(block[:HEADER_BYTES], where) != length:
            raise ValueError(f"{where}: the file has changed since it was indexed")
        payload = block[HEADER_BYTES:-FOOTER_BYTES]
        _check_payload(payload, block[-FOOTER_BYTES:], where)
        return payload

    def _scan(self) -> np.ndarray:
        """Walks over the headers: int64[N, 2]."""
        records: list[tuple[int, int]] = []
        size = storage.size(self.path)
        with storage.open_read(self.path) as file, storage.naming(self.path):
            offset = 0
            while offset < size:
                where = self.where(len(records))
                length = _payload_length(_read_at(file, offset, HEADER_BYTES), where)
                end = offset + HEADER_BYTES + length + FOOTER_BYTES
                if end > size:
                    raise ValueError(
                        f"{where}: truncated, the record ends at byte {end}, the file at {size}"
                    )
                records.append((offset, length))
                offset = end
        return np.array(records, np.int64).reshape(-1, 2)


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """Up to `length` bytes from `offset` on."""
    file.seek(offset)
    return file.read(length)


def _payload_length(header: bytes, where: str) -> int:
    """The payload length that a header states, its checksum checked."""
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{where}: truncated, the file ends inside the header")
    length, stored = struct.unpack("<QI", header)
    if masked_crc(header[:8]) != stored:
        raise ValueError(
            f"{where}: bad CRC of the length (stored {stored:#010x}, computed "
            f"{masked_crc(header[:8]):#010x}); the file is corrupt or is no TFRecord file"
        )
    return int(length)


def _check_payload(payload: bytes, footer: bytes, where: str) -> int:
    """The CRC that follows a payload, checked."""
    (stored,) = struct.unpack("<I", footer)
    if masked_crc(payload) != stored:
        raise ValueError(
            f"{where}: bad CRC of the data (stored {stored:#010x}, computed "
            f"{masked_crc(payload):#010x}); the file is corrupt"
        )
    return int(stored)
