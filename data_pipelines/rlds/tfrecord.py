"""TFRecord files: where each record lies, and one record by its number.

A TFRecord file is a run of records with nothing between them; every number is little-endian::

    [ length ][ masked CRC of length ][ payload      ][ masked CRC of payload ]
      uint64     uint32                 length bytes     uint32

So a file is indexed by reading 12 bytes per record and skipping the payload, and afterwards any
record is one read. Both checksums are CRC-32C, rotated and offset ("masked") so that a CRC of data
that holds CRCs stays meaningful.

Source: tensorflow/core/lib/io/record_writer.h and tensorflow/core/lib/hash/crc32c.h.
"""

import os
import struct
from pathlib import Path

import google_crc32c
import numpy as np

HEADER_BYTES = 12
FOOTER_BYTES = 4


def masked_crc(data: bytes) -> int:
    """The CRC-32C of `data` in TFRecord's masked form, in [0, 2**32)."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class TFRecordFile:
    """One TFRecord file, indexed when it is opened and then read by record number.

    The file is opened anew for each read: a dataset may have more shards than a process may have
    open files, and
    the object can be shared by threads and pickled.

    Attributes:
      path: the file.
      records: int64[N, 2], the byte offset of each record's header and the byte length of its
        payload.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Finds every record of the file, checking the lengths' checksums but not the payloads'.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is truncated or a length is corrupt; names the file and the record.
        """
        self.path = Path(path)
        self.records = self._scan()

    def __len__(self) -> int:
        return len(self.records)

    def where(self, record: int) -> str:
        """Names a record in messages: "/data/x.tfrecord-00000-of-00001, record 3"."""
        return f"{self.path}, record {record}"

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
        file = os.open(self.path, os.O_RDONLY)
        try:
            block = os.pread(file, size, offset)
        finally:
            os.close(file)
        if len(block) < size:
            raise ValueError(
                f"{self.where(record)}: truncated, {len(block)} of {size} bytes are left"
            )
        if self._length(block[:HEADER_BYTES], record) != length:
            raise ValueError(f"{self.where(record)}: the file has changed since it was indexed")
        payload = block[HEADER_BYTES:-FOOTER_BYTES]
        (stored,) = struct.unpack("<I", block[-FOOTER_BYTES:])
        if masked_crc(payload) != stored:
            raise ValueError(
                f"{self.where(record)}: bad CRC of the data (stored {stored:#010x}, computed "
                f"{masked_crc(payload):#010x}); the file is corrupt"
            )
        return payload

    def _scan(self) -> np.ndarray:
        """Walks over the headers: int64[N, 2]."""
        records: list[tuple[int, int]] = []
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset = 0
            while offset < size:
                record = len(records)
                header = os.pread(file.fileno(), HEADER_BYTES, offset)
                if len(header) < HEADER_BYTES:
                    raise ValueError(
                        f"{self.where(record)}: truncated, the file ends at byte {size} "
                        f"inside the header"
                    )
                length = self._length(header, record)
                end = offset + HEADER_BYTES + length + FOOTER_BYTES
                if end > size:
                    raise ValueError(
                        f"{self.where(record)}: truncated, the record ends at byte {end}, "
                        f"the file at {size}"
                    )
                records.append((offset, length))
                offset = end
        return np.array(records, np.int64).reshape(-1, 2)

    def _length(self, header: bytes, record: int) -> int:
        """The payload length that a header states, its checksum checked."""
        length, stored = struct.unpack("<QI", header)
        if masked_crc(header[:8]) != stored:
            raise ValueError(
                f"{self.where(record)}: bad CRC of the length (stored {stored:#010x}, computed "
                f"{masked_crc(header[:8]):#010x}); the file is corrupt or is no TFRecord file"
            )
        return int(length)
