"""`lara data stats`: what normalisation needs to know of a dataset, without decoding one image.

The index holds the standardised actions and states as flat arrays; one pass over them, a chunk of
whole episodes at a time, gives min, max, mean, std, q01 and q99 of every dimension::

    actions.bin | chunk | chunk | chunk | ...  ->  Accumulator  ->  Statistics

Every step counts once, after standardisation and before chunks are cut. Take the statistics on the
training split and use the same for every other split: they are part of the model.
"""

import argparse
import errno
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.accumulator import Accumulator, first_non_finite
from data_pipelines.cli import at_least_one, option
from data_pipelines.index.format import FLAGS, Index
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.sampling import strided_actions
from data_pipelines.storage import local_path
from lara_jax.evals.report import format_table
from lara_jax.transforms import Normalizer, Statistics

FORMAT_VERSION = 1
CHUNK_ROWS = 1 << 16
CHUNKS_PER_SAVE = 16
ALL = slice(None)
COLUMNS = tuple(field.name for field in fields(Statistics))


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """All that is needed to normalise one dataset's vectors, and to undo it.

    Attributes:
      dataset: its name.
      steps, episodes: how many were counted.
      action, state: per-dimension statistics, in the data's units.
      action_modes, state_modes: how each dimension is normalised (lara_jax.transforms).
      action_encoding, state_encoding: what the vectors mean, such as "EEF_POS" and "POS_EULER".
      absolute_action: per action dimension, True where it is a position to hold, not a change.
      control_hz: actions a second: the data's rate, divided by the stride they were taken at.
    """

    dataset: str
    steps: int
    episodes: int
    action: Statistics
    state: Statistics
    action_modes: tuple[str, ...]
    state_modes: tuple[str, ...]
    action_encoding: str
    state_encoding: str
    absolute_action: tuple[bool, ...]
    control_hz: float

    def __post_init__(self) -> None:
        widths = {
            "action": (self.action.width, len(self.action_modes), len(self.absolute_action)),
            "state": (self.state.width, len(self.state_modes)),
        }
        for name, found in widths.items():
            if len(set(found)) != 1:
                raise ValueError(f"{self.dataset}: {name} statistics and modes {found} wide")

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DatasetStatistics":
        """The inverse of `to_dict`."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(
                f"dataset statistics have the fields {sorted(values)}; expected {sorted(names)}"
            )
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        for name in ("action", "state"):
            plain[name] = Statistics.from_dict(values[name])
        return cls(**plain)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file."""
        _replace(Path(path), json.dumps(self.to_dict(), indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DatasetStatistics":
        """Reads what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def normalizers(statistics: DatasetStatistics) -> tuple[Normalizer, Normalizer]:
    """The action's and the state's normaliser."""
    return (
        Normalizer(modes=statistics.action_modes, statistics=statistics.action),
        Normalizer(modes=statistics.state_modes, statistics=statistics.state),
    )


def index_statistics(
    index: Index,
    *,
    filters: Sequence[str] = (),
    stride: int = 1,
    episodes: slice = ALL,
) -> DatasetStatistics:
    """The statistics of an index's steps, from the cache beside it where they are there.

    A run that is killed goes on, the next time, from where it last saved its state.

    Args:
      index: of one split.
      filters: names of FLAGS; rows that carry one of them do not count.
      stride: of the actions (see `data_pipelines.sampling`); states and the count of steps stay as
        they are.
      episodes: a contiguous part of them.

    Raises:
      ValueError: an unknown filter, a bad stride, no steps, or a value that is not finite.
    """
    filters = sorted(set(filters))
    unknown = sorted(set(filters) - set(FLAGS))
    if unknown:
        raise ValueError(f"unknown filters {unknown}; known: {', '.join(FLAGS)}")
    if stride < 1:
        raise ValueError(f"stride {stride}; at least 1")
    first, last, step = episodes.indices(len(index.episodes))
    if step != 1:
        raise ValueError(f"episodes {episodes}: only a contiguous part can be taken")
    last = max(first, last)
    job = {
        "index": index.header.digest,
        "filters": filters,
        "stride": stride,
        "episodes": [first, last],
        "format_version": FORMAT_VERSION,
    }
    name = ".".join(
        [
            "statistics",
            *filters,
            *([f"stride{stride}"] if stride > 1 else []),
            *([f"episodes{first}-{last}"] if last - first < len(index.episodes) else []),
        ]
    )
    cache, partial = index.folder / f"{name}.json", index.folder / f"{name}.partial"
    cached = _read_cache(cache, job)
    if cached is not None:
        return cached
    statistics = _compute(index, job, partial)
    values = statistics.to_dict()
    text = json.dumps({"checksum": _checksum(job, values), "job": job, "statistics": values})
    if _save(cache, text.encode()):
        partial.unlink(missing_ok=True)
    else:
        _say(f"{index.folder} is read only: its statistics were taken, but are not kept")
    return statistics


def _compute(index: Index, job: Mapping[str, Any], partial: Path) -> DatasetStatistics:
    """One pass over the index, from where the last one was cut off."""
    spec, filters, stride = index.spec, job["filters"], job["stride"]
    first, last = job["episodes"]
    bits = sum(FLAGS[name] for name in filters)
    ends = (index.episodes["first_row"] + index.episodes["rows"])[:last]
    first_row = int(ends[first - 1]) if first else 0
    rows_to_do = int(ends[-1]) - first_row if first < last else 0
    state = _read_partial(partial, job) or _Pass(
        action=Accumulator(index.actions.shape[1]),
        state=Accumulator(index.states.shape[1]),
        next_episode=first,
    )
    bar = tqdm(
        desc=f"statistics of {spec.name}",
        total=rows_to_do,
        initial=int(ends[state.next_episode - 1]) - first_row if state.next_episode else 0,
        unit=" steps",
        unit_scale=True,
        delay=1,
        mininterval=1,
        file=sys.stderr,
    )
    strided = islice(strided_actions(index, stride), state.next_episode, None)
    with bar:
        for number, (end, start_row, end_row) in enumerate(_chunks(ends, state.next_episode), 1):
            rows = index.array("rows.bin")[start_row:end_row]
            kept = (rows["flags"] & bits) == 0
            actions, states = (
                _finite(index, name, start_row, end_row) for name in ("actions", "states")
            )
            if stride > 1:
                actions = np.concatenate(list(islice(strided, end - state.next_episode)))
            state.action.update(actions[kept])
            state.state.update(states[kept])
            state.episodes += len(np.unique(rows["episode"][kept]))
            state.next_episode = end
            if number % CHUNKS_PER_SAVE == 0:
                _save(partial, state.to_bytes(job))
            bar.update(end_row - start_row)
    if not state.action.count:
        raise ValueError(
            f"{spec.name}: filters {filters} leave no step of the {rows_to_do} in episodes "
            f"{first} to {last}"
        )
    return statistics_of(spec, state.action, state.state, episodes=state.episodes, stride=stride)


def statistics_of(
    spec: DatasetSpec, action: Accumulator, state: Accumulator, *, episodes: int, stride: int
) -> DatasetStatistics:
    """What a pass over a dataset has come to.

    Args:
      spec: the dataset.
      action, state: all that was counted.
      episodes: of which it was.
      stride: steps in an action.

    Raises:
      ValueError: nothing was counted.
    """
    return DatasetStatistics(
        dataset=spec.name,
        steps=action.count,
        episodes=episodes,
        action=action.result(),
        state=state.result(),
        action_modes=spec.action_modes,
        state_modes=spec.state_modes,
        action_encoding=spec.action_encoding,
        state_encoding=spec.state_encoding,
        absolute_action=spec.absolute_action,
        control_hz=spec.control_hz / stride,
    )


def _chunks(ends: np.ndarray, episode: int) -> Iterator[tuple[int, int, int]]:
    """Whole episodes of CHUNK_ROWS rows or little more: up to which, from which row, to which.

    Args:
      ends: int64[E], the row after each episode's last.
      episode: the first one.
    """
    while episode < len(ends):
        start = int(ends[episode - 1]) if episode else 0
        until = min(start + CHUNK_ROWS, int(ends[-1]))
        episode = int(np.searchsorted(ends, until)) + 1
        yield episode, start, int(ends[episode - 1])


def _finite(index: Index, name: str, start: int, end: int) -> np.ndarray:
    """Rows of the actions or the states, mapped anew: the chunks before can leave memory."""
    values = index.array(f"{name}.bin")[start:end]
    bad = first_non_finite(values)
    if bad is not None:
        raise ValueError(
            f"{index.spec.name}: {name}, dimension {bad[1]}: {values[bad]} in "
            f"{index.where(start + bad[0])}"
        )
    return values


@dataclass(kw_only=True)
class _Pass:
    """A pass before an episode, and how many of those before counted.

    It is saved as an npz, its SHA-256 before it.
    """

    action: Accumulator
    state: Accumulator
    next_episode: int
    episodes: int = 0

    def to_bytes(self, job: Mapping[str, Any]) -> bytes:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            job=json.dumps(job),
            position=np.array([self.next_episode, self.episodes]),
            action=np.frombuffer(self.action.to_bytes(), np.uint8),
            state=np.frombuffer(self.state.to_bytes(), np.uint8),
        )
        return hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue()


def _read_partial(path: Path, job: Mapping[str, Any]) -> _Pass | None:
    """What a pass that was cut off has left; None, said on stderr, where it is of no use."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    if hashlib.sha256(data[32:]).digest() != data[:32]:
        _say(f"{path} is damaged: taking the statistics from the start")
        return None
    with np.load(io.BytesIO(data[32:])) as saved:
        if json.loads(str(saved["job"])) != job:
            _say(f"{path} belongs to another index: taking the statistics from the start")
            return None
        next_episode, episodes = saved["position"].tolist()
        vectors = (Accumulator.from_bytes(saved[name].tobytes()) for name in ("action", "state"))
        action, state = vectors
    return _Pass(action=action, state=state, next_episode=next_episode, episodes=episodes)


def _read_cache(path: Path, job: Mapping[str, Any]) -> DatasetStatistics | None:
    """Statistics taken before; None, said on stderr, where the file is of no use."""
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["checksum"] != _checksum(saved["job"], saved["statistics"]):
            raise ValueError("the checksum does not agree")
    except (ValueError, TypeError, KeyError) as error:
        _say(f"{path} is damaged ({error}): taking the statistics again")
        return None
    if saved["job"] != job:
        _say(f"{path} belongs to another index: taking the statistics again")
        return None
    return DatasetStatistics.from_dict(saved["statistics"])


def _checksum(job: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([job, values], sort_keys=True).encode()).hexdigest()


def _save(path: Path, data: bytes) -> bool:
    """Writes a file at once; False where the folder is read only."""
    try:
        _replace(path, data)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return False
        raise
    return True


def _replace(path: Path, data: bytes) -> None:
    """The file appears under its name when it is complete."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """`lara data stats`: prints the statistics of a split."""
    parser = argparse.ArgumentParser(
        prog="lara data stats",
        description="Statistics of a dataset's actions and states; no image is decoded.",
    )
    parser.add_argument("data", help="a dataset's version directory, its URL, or an index's folder")
    parser.add_argument("--split", default="train", help="such as train[:95%%] (default: train)")
    parser.add_argument("--name", help="of the dataset (default: what its files say)")
    parser.add_argument("--definitions", metavar="FILE", help="datasets of your own")
    parser.add_argument(
        "--filter", action="append", default=[], choices=FLAGS, help="rows not to count; repeatable"
    )
    parser.add_argument(
        "--stride", type=option(at_least_one), default=1, help="of the actions (default: 1)"
    )
    parser.add_argument(
        "--out", type=option(local_path), metavar="FILE", help="save them as JSON, too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    # Statistics that are there are read, by a policy, say, without what makes an index.
    from data_pipelines import catalog

    entry = catalog.Entry(path=arguments.data, name=arguments.name)
    part = catalog.open_part(entry, arguments.split, definitions=arguments.definitions or "")
    statistics = index_statistics(
        part.index, filters=arguments.filter, stride=arguments.stride, episodes=part.episodes
    )
    if arguments.out is not None:
        statistics.save(arguments.out)
    print(json.dumps(statistics.to_dict()) if arguments.json else describe(statistics))
    return 0


def describe(statistics: DatasetStatistics) -> str:
    """The statistics as a table, a line for each dimension."""
    rows: list[list[object]] = []
    for name, vector, modes in (
        ("action", statistics.action, statistics.action_modes),
        ("state", statistics.state, statistics.state_modes),
    ):
        columns = zip(modes, *(getattr(vector, column) for column in COLUMNS), strict=True)
        rows += [[f"{name}[{number}]", *values] for number, values in enumerate(columns)]
    title = f"{statistics.dataset}: {statistics.steps} steps of {statistics.episodes} episodes"
    return title + "\n" + format_table(["dimension", "mode", *COLUMNS], rows)
