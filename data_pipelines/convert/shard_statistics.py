"""Statistics of a dataset straight from its files, shard by shard, without an index.

    shard 0 -> Totals \\
    shard 1 -> Totals  }  merged in any order  ->  DatasetStatistics
    shard 2 -> Totals /

What `lara data stats` gives for an index of the same files. Only the last digits of mean and std
depend on the order of merging and, beyond the rows whose quantiles are exact
(data_pipelines.accumulator), q01 and q99 within the sketch's error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.accumulator import Accumulator, first_non_finite
from data_pipelines.index.filters import row_flags
from data_pipelines.index.format import FLAGS, EpisodeEntry
from data_pipelines.index.source import IndexSource
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.sampling import action_chunks
from data_pipelines.statistics import DatasetStatistics, statistics_of


@dataclass(kw_only=True)
class Totals:
    """Statistics on their way: of the actions and states of so many episodes."""

    action: Accumulator
    state: Accumulator
    episodes: int = 0

    @classmethod
    def empty(cls, spec: DatasetSpec) -> "Totals":
        """Of nothing."""
        return cls(action=Accumulator(spec.action_dim), state=Accumulator(spec.state_dim))

    def merge(self, other: "Totals") -> None:
        """Counts all that another one has counted."""
        self.action.merge(other.action)
        self.state.merge(other.state)
        self.episodes += other.episodes

    def __reduce__(self) -> Any:
        # Not all that an accumulator holds pickles by itself.
        return _unpickled, (self.action.to_bytes(), self.state.to_bytes(), self.episodes)

    def result(self, spec: DatasetSpec, *, stride: int = 1) -> DatasetStatistics:
        """The statistics; `stride` as for `shard_totals`.

        Raises:
          ValueError: nothing was counted.
        """
        return statistics_of(spec, self.action, self.state, episodes=self.episodes, stride=stride)


def result_json(spec: DatasetSpec, stride: int, totals: Totals) -> str:
    """`Totals.result` as one line of JSON."""
    return json.dumps(totals.result(spec, stride=stride).to_dict())


def shard_totals(
    source: IndexSource, shard: int, *, filters: Sequence[str] = (), stride: int = 1
) -> Totals:
    """Counts the steps of one shard.

    Args:
      source: the dataset.
      shard: its number in `source.shards`.
      filters: names of FLAGS; rows that carry one of them do not count.
      stride: steps in an action (see `data_pipelines.sampling.action_chunks`).

    Raises:
      ValueError: an unknown filter, or a value that is not finite.
    """
    unknown = sorted(set(filters) - set(FLAGS))
    if unknown:
        raise ValueError(f"unknown filters {unknown}; known: {', '.join(FLAGS)}")
    bits = sum(FLAGS[name] for name in filters)
    totals = Totals.empty(source.spec)
    for entry in source.episodes(shard):
        _check_finite(source, entry)
        kept = ((entry.flags | row_flags(source.spec, entry)) & bits) == 0
        totals.action.update(_strided(entry.actions, stride, source.spec)[kept])
        totals.state.update(entry.states[kept])
        totals.episodes += bool(kept.any())
    return totals


def _unpickled(action: bytes, state: bytes, episodes: int) -> Totals:
    parts = Accumulator.from_bytes(action), Accumulator.from_bytes(state)
    return Totals(action=parts[0], state=parts[1], episodes=episodes)


def _strided(actions: np.ndarray, stride: int, spec: DatasetSpec) -> np.ndarray:
    """The first action of the chunk from each row on: float32[N, A]."""
    if stride == 1 or not len(actions):
        return actions
    absolute, rows = np.array(spec.absolute_action), np.arange(len(actions))
    ends = np.full(len(actions), len(actions))
    return action_chunks(actions, rows, ends, 1, absolute, stride)[0][:, 0]


def _check_finite(source: IndexSource, entry: EpisodeEntry) -> None:
    for name, values in (("actions", entry.actions), ("states", entry.states)):
        bad = first_non_finite(values)
        if bad is not None:
            row, dimension = bad
            raise ValueError(
                f"{source.spec.name}: {name}, dimension {dimension}: {values[bad]} in "
                f"{source.files[entry.file].path}, record {entry.record}, step {entry.frame[row]}"
            )
