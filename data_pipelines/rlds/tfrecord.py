"""TFRecord files: every record in order, checked.

A TFRecord file is a run of records with nothing between them; every number is little-endian::

    [ length ][ masked CRC of length ][ payload      ][ masked CRC of payload ]
      uint64     uint32                 length bytes     uint32

Both checksums are CRC-32C, rotated and offset ("masked") so that a CRC of data
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
            end = offset + HEADER_BYTES + length + FOOTER_BYTES
            found = offset + HEADER_BYTES + len(payload) + len(footer)
            if found < end:
                raise ValueError(
                    f"{where}: truncated, the record ends at byte {end}, the file at {found}"
                )
            stored = _check_payload(payload, footer, where)
            yield Record(number, offset + HEADER_BYTES, payload, stored)
            offset = end
            number += 1


def checksum_of(crcs: Iterable[int]) -> str:
    """A file's checksum: the CRC-32C over its records' stored CRCs, 8 hexadecimal digits."""
    return f"{google_crc32c.value(np.array(list(crcs), '<u4').tobytes()):08x}"


def where_record(path: str | os.PathLike[str], number: int) -> str:
    """Names a record in messages: "/data/x.tfrecord-00000-of-00001, record 3"."""
    return f"{path}, record {number}"


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
