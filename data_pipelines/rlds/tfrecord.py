"""TFRecord files: every record in order, or their checksums alone.

A TFRecord file is a run of records with nothing between them; every number is little-endian::

    [ length ][ masked CRC of length ][ payload      ][ masked CRC of payload ]
      uint64     uint32                 length bytes     uint32

So a file's records are found by reading 12 bytes of each and skipping the payload, and any of them
is then one read. Both checksums are CRC-32C, rotated and offset ("masked") so that a CRC of data
that holds CRCs stays meaningful. The file may be a local one or a URL (`data_pipelines.storage`).

Source: tensorflow/core/lib/io/record_writer.h and tensorflow/core/lib/hash/crc32c.h.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

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
            end = offset + _record_bytes(length)
            found = offset + HEADER_BYTES + len(payload) + len(footer)
            if found < end:
                raise _truncated(where, end, found)
            stored = _check_payload(payload, footer, where)
            yield Record(number, offset + HEADER_BYTES, payload, stored)
            offset = end
            number += 1


def checksum_of(crcs: Iterable[int]) -> str:
    """A file's checksum: the CRC-32C over its records' stored CRCs, 8 hexadecimal digits."""
    return f"{google_crc32c.value(np.array(list(crcs), '<u4').tobytes()):08x}"


def stored_crcs(path: str | os.PathLike[str]) -> list[int]:
    """The CRC that each record carries of its payload, in order; the payloads are skipped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or a length is corrupt; names the file and the record.
    """
    crcs: list[int] = []
    offset, size = 0, storage.size(path)
    with storage.open_read(path) as file, storage.naming(path):
        while offset < size:
            file.seek(offset)
            where = where_record(path, len(crcs))
            offset += _record_bytes(_payload_length(file.read(HEADER_BYTES), where))
            if offset > size:
                raise _truncated(where, offset, size)
            file.seek(offset - FOOTER_BYTES)
            crcs.append(struct.unpack("<I", file.read(FOOTER_BYTES))[0])
    return crcs


def where_record(path: str | os.PathLike[str], number: int) -> str:
    """Names a record in messages: "/data/x.tfrecord-00000-of-00001, record 3"."""
    return f"{path}, record {number}"


def _record_bytes(length: int) -> int:
    """The bytes that a record of this payload length takes in the file."""
    return HEADER_BYTES + length + FOOTER_BYTES


def _truncated(where: str, end: int, size: int) -> ValueError:
    """The error of a file that ends before a record does."""
    return ValueError(f"{where}: truncated, the record ends at byte {end}, the file at {size}")


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
