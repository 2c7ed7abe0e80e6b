"""TensorBoard's event files, scalars only: no TensorFlow, no torch, no writer that imports them.

An event file is a TFRecord file whose records are `tensorflow.Event` messages. Of these a scalar
needs few fields, so they are encoded here, each as its key (number * 8 + wire type) and value::

    Event    1 wall_time double   2 step int64   3 file_version string   5 summary Summary
             7 session_log SessionLog
    Summary  1 value Value        Value  1 tag string   2 simple_value float
    SessionLog  1 status enum, START = 1: what earlier files have from this step on is void

Source: tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from data_pipelines.rlds.tfrecord import masked_crc


class EventFile:
    """Appends scalars to a new event file, each call at once.

    Args:
      folder: TensorBoard's log directory; made where it is missing.
      first_step: of this run; TensorBoard drops what earlier files say of it and later steps.
    """

    def __init__(self, folder: str | os.PathLike[str], *, first_step: int) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._file = self.path.open("ab")
        self._append(_double(1, now) + _bytes(3, b"brain.Event:2"))
        start = _bytes(7, _integer(1, 1))
        self._append(_double(1, now) + _integer(2, first_step) + start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step, by tag."""
        summary = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in values.items()
        )
        self._append(_double(1, time.time()) + _integer(2, step) + _bytes(5, summary))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        crcs = [struct.pack("<I", masked_crc(part)) for part in (length, event)]
        self._file.write(length + crcs[0] + event + crcs[1])
        self._file.flush()


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the top bit set in all but the last."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
