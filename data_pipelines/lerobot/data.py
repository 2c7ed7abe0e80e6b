"""The rows of a data file as arrays, episode by episode, checked against what meta/ says.

    file-000.parquet    episode_index  3 3 3 3 4 4 4 ...    (v2.0, v2.1: one episode a file)
                        timestamp      0 .2 .4 .6 0 .2 .4
                        action         [7 numbers] ...      -> float32[T, 7]

A row is the step timestamp * fps of its episode; rows that are missing, doubled or out of order
show there.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines import storage
from data_pipelines.lerobot.layouts import INSTRUCTION
from data_pipelines.lerobot.meta import Episode, Metadata, read_table
from data_pipelines.oxe.terms import RawFeature

if TYPE_CHECKING:  # at run time only after `meta`, which says what to install where it is absent
    import pyarrow as pa


def read_episodes(
    metadata: Metadata,
    episodes: Sequence[Episode],
    columns: Iterable[str],
    *,
    tolerance_seconds: float,
) -> dict[int, dict[str, RawFeature]]:
    """Reads episodes of one data file.

    Args:
      metadata: of the data set.
      episodes: all in the same file.
      columns: to read; INSTRUCTION stands for the text of the step's task where there is no such
        column.
      tolerance_seconds: how far a row's timestamp may be from step / fps.

    Returns:
      By episode number and column: numbers [T, ...], or T byte strings.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column, a row or a task is missing, a row has another shape than its feature, or
        the timestamps do not fit the rate.
    """
    file = episodes[0].data_file
    where = storage.join(metadata.root, file)
    task_column = metadata.modality.task_column if metadata.modality else "task_index"
    stored = dict.fromkeys(columns)
    words = INSTRUCTION in stored and INSTRUCTION not in metadata.features
    if words:
        del stored[INSTRUCTION]
    keys = dict.fromkeys(("episode_index", "timestamp", *stored, *([task_column] if words else [])))
    table = read_table(metadata.root, file, keys)
    numbers = table.column("episode_index").to_numpy()
    found = {}
    for episode in episodes:
        rows = np.flatnonzero(numbers == episode.number)
        if len(rows) != episode.length or not len(rows):
            raise ValueError(
                f"{where} has {len(rows)} rows of episode {episode.number}; the list of episodes "
                f"says {episode.length}"
            )
        part = table.slice(rows[0], len(rows))  # rows apart would show in the timestamps
        place = f"{where}, episode {episode.number}"
        _check_times(part.column("timestamp").to_numpy(), metadata.fps, tolerance_seconds, place)
        raw = {key: _feature(part.column(key), metadata, key, place) for key in stored}
        if words:
            raw[INSTRUCTION] = _tasks(part.column(task_column).to_numpy(), metadata.tasks, place)
        found[episode.number] = raw
    return found


def _check_times(seconds: np.ndarray, fps: float, tolerance_seconds: float, where: str) -> None:
    """Row t is at t / fps, but for the tolerance and the rounding of a float32."""
    expected = np.arange(len(seconds)) / fps
    off = np.abs(seconds - expected) > tolerance_seconds + np.spacing(np.float32(expected[-1]))
    if off.any():
        row = int(np.argmax(off))
        raise ValueError(
            f"{where}, row {row}: timestamp {seconds[row]:.6f} s; at {fps:g} steps a second it "
            f"should be {expected[row]:.6f}, allowed are {tolerance_seconds:g} s more or less"
        )


def _feature(column: "pa.ChunkedArray", metadata: Metadata, key: str, where: str) -> RawFeature:
    """A column's rows: numbers in the feature's shape, or byte strings.

    An image (a struct) gives the bytes of its file.
    """
    import pyarrow as pa

    values: pa.Array = pa.concat_arrays(column.chunks)
    if pa.types.is_struct(values.type):
        values = values.field("bytes")
    if values.null_count:
        raise ValueError(f"{where}: column {key!r} has {values.null_count} empty rows")
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        return [bytes(value) for value in values.to_pylist()]
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return [value.encode() for value in values.to_pylist()]
    while pa.types.is_nested(values.type):
        values = values.flatten()
    numbers = values.to_numpy(zero_copy_only=False)
    feature = metadata.features.get(key)
    shape = feature.shape if feature else (numbers.size // len(column),)
    if numbers.size != len(column) * int(np.prod(shape)):
        raise ValueError(
            f"{where}: column {key!r} has {numbers.size} numbers in {len(column)} rows; its shape "
            f"in info.json is {shape}"
        )
    return numbers.reshape(len(column), *shape)


def _tasks(indices: np.ndarray, tasks: Mapping[int, str], where: str) -> list[bytes]:
    """The text of each row's task."""
    unknown = sorted(set(indices.tolist()) - set(tasks))
    if unknown:
        raise ValueError(f"{where}: no text of task {unknown[0]}; there are {len(tasks)} tasks")
    return [tasks[index].encode() for index in indices.tolist()]
