"""Frames in one ArrayRecord record a step: for storage that dislikes many small reads.

    tiny_set-train.array_record-00003-of-01024
      record 0      tf.train.Example  {"image_0": JPEG, "image_1": JPEG}     an episode's first step
      record 1      {"image_0": JPEG, "image_1": JPEG}                       its second one
      ...

A record holds the encoded frames of the chosen cameras of one stored step, byte for byte as they
were, and nothing else: actions, states and words stay in the index, so that the length of a chunk
or a filter can change without a new conversion. Records are neither grouped nor compressed (a JPEG
does not shrink), so that reading one reads nothing else.
"""

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines import storage
from data_pipelines.convert.output import new_file

WRITER_OPTIONS = "group_size:1,uncompressed"
# Nothing is read ahead: the next record is anywhere.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
READER_BUFFER_BYTES = 32 * 2**10
# A reader holds its file open; a process may usually have 1024 of them.
OPEN_READERS = 512


def write(path: str | os.PathLike[str], steps: Iterable[Mapping[str, bytes]]) -> int:
    """Writes a file of step records; it appears when it is complete.

    Args:
      path: of the file, or its URL.
      steps: per step, the encoded frame of each camera.

    Returns:
      The number of steps.

    Raises:
      OSError: it cannot be written.
    """
    count = 0
    with new_file(path) as file:
        writer = ArrayRecordWriter(str(file), WRITER_OPTIONS)
        for frames in steps:
            example = tf_example_pb2.Example()
            for camera, data in frames.items():
                example.features.feature[camera].bytes_list.value.append(data)
            writer.write(example.SerializeToString(deterministic=True))
            count += 1
        try:
            writer.close()  # only here does the library say that the disk is full
        except RuntimeError as error:
            raise OSError(f"{path}: {error}") from error
    return count


def read_frame(path: str | os.PathLike[str], record: int, camera: str) -> bytes:
    """One encoded frame; safe in any number of threads.

    Args:
      path: of a local file.
      record: its number in the file.
      camera: by name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is remote, incomplete or damaged, or has no such record or camera.
    """
    reader = _reader(os.fspath(path))
    if not 0 <= record < reader.num_records():
        raise ValueError(f"{path} has {reader.num_records()} records, no record {record}")
    try:
        (data,) = reader.read([record])
    except RuntimeError as error:
        raise ValueError(f"{path}, record {record}: {error}") from error
    features = tf_example_pb2.Example.FromString(data).features.feature
    if camera not in features:
        raise ValueError(
            f"{path}, record {record} has no camera {camera!r}; it has: "
            f"{', '.join(sorted(features))}"
        )
    (frame,) = features[camera].bytes_list.value
    return frame


@lru_cache(maxsize=OPEN_READERS)
def _reader(path: str) -> Any:
    """An open file. The library itself opens a missing or a truncated one as an empty one."""
    if not storage.is_local(path):
        raise ValueError(f"{path}: ArrayRecord files are read from a local or mounted disk only")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    reader = ArrayRecordReader(path, READER_OPTIONS, file_reader_buffer_size=READER_BUFFER_BYTES)
    if not reader.num_records():
        raise ValueError(f"{path} has no record: it is truncated or is no ArrayRecord file")
    return reader
