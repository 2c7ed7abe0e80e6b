"""A mixture of datasets, as a pure function from a position in the stream to a step.

The stream is endless. It consists of epochs of C positions, in which set i has c_i draws, so that
every epoch has exactly the same shares. With balance "size", c_i = weight_i * steps_i, rounded: a
weight says how often each step of a set comes up in an epoch (Octo and OpenVLA: `balance_weights`).
With "none", C is the number of all steps, and c_i are shares of it by weight alone.

Position g of the stream lies in epoch e = g // C; two seeded permutations make a step of it::

    positions of epoch e    0 1 2 3 4 5 6 7 8 9      C = 10
      permuted by (seed, e)       |
                                  v
    draws of the epoch      [0 0 0 0 0|1 1 1|2 2]    c = 5, 3, 2: here draw r = 2 of set 1
                                           |
    draws of set 1          it is the set's k-th, k = e * c_1 + r, in pass k // steps_1 over the set
      permuted by (seed, 1, pass)          |
                                           v
    steps of set 1          number k % steps_1, permuted

So a pass over a set takes each of its steps once, and after any number of epochs the steps of a set
have come up equally often, or some of them once more. Permuting the epoch as a whole, rather than
taking the sets in turns, keeps strided hosts from seeing some of the sets only. Permutations are
computed index by index: memory is that of the sets' counts, however long the stream.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from data_pipelines.memory import Memory
from data_pipelines.permutation import permuted
from data_pipelines.sampling import StepSource

BALANCES = ("size", "none")
_ALGORITHM = 1  # of the stream: part of the fingerprint


@dataclass(frozen=True, kw_only=True, eq=False)
class MixtureSource:
    """Steps of several datasets in an endless, shuffled stream; one dataset is a mixture too.

    Attributes:
      sources: of the datasets, alike in views, next frames, frame size, action chunk and
        action width.
      weights: one for each source, positive.
      seed: of the shuffle.
      balance: "size" or "none", see the top of this file.
    """

    sources: tuple[StepSource, ...]
    weights: tuple[float, ...]
    seed: int = 0
    balance: str = "size"

    def __post_init__(self) -> None:
        if not self.sources or len(self.weights) != len(self.sources):
            raise ValueError(
                f"{len(self.sources)} datasets and {len(self.weights)} weights; expected at least "
                f"one dataset and a weight for each"
            )
        for source, weight in zip(self.sources, self.weights, strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"dataset {source.name!r}: weight {weight}; it must be positive")
        if self.balance not in BALANCES:
            raise ValueError(f"balance is {self.balance!r}; known: {', '.join(BALANCES)}")
        self._check_alike("views", [source.views for source in self.sources])
        self._check_alike("action_horizon", [source.action_horizon for source in self.sources])
        self._check_alike("image_size", [source.size for source in self.sources])
        self._check_alike("action_dim", [source.width for source in self.sources])
        self._check_alike("next_frames", [source.next_frames for source in self.sources])
        missing = set.intersection(*(set(source.missing_views) for source in self.sources))
        if missing:
            raise ValueError(f"no dataset has the view(s) {sorted(missing)}; {self._cameras()}")
        names = {source.name for source in self.sources}
        if len(names) < len(self.sources):
            raise ValueError(
                f"{len(self.sources)} datasets have {len(names)} names ({', '.join(sorted(names))})"
                f"; each must have its own, as statistics are kept by name"
            )

    @cached_property
    def draws(self) -> tuple[int, ...]:
        """c_i, how many steps an epoch takes from each set.

        Raises:
          ValueError: a set has no steps, or too small a weight to come up at all.
        """
        for source in self.sources:
            if not len(source):
                raise ValueError(
                    f"{source}: no step to learn from; {source.filtered_rows} rows "
                    f"were left out by its filters"
                )
        sizes = [len(source) for source in self.sources]
        if self.balance == "size":
            draws = [math.floor(w * n + 0.5) for w, n in zip(self.weights, sizes, strict=True)]
            needed = [0.5 / n for n in sizes]
        else:
            draws = _apportion(sum(sizes), self.weights)
            total = sum(self.weights)
            needed = [(total - w) / max(sum(sizes) - 1, 1) for w in self.weights]
        for source, weight, count, least in zip(
            self.sources, self.weights, draws, needed, strict=True
        ):
            if not count:
                raise ValueError(
                    f"dataset {source.name!r}: with weight {weight:g} none of its {len(source)} "
                    f"steps comes up in an epoch; a weight of {least:.3g} is needed"
                )
        return tuple(draws)

    def __len__(self) -> int:
        """C, the steps of an epoch."""
        return self._ends[-1]

    def __repr__(self) -> str:
        names = ", ".join(
            f"{s.name}: {w:g}" for s, w in zip(self.sources, self.weights, strict=True)
        )
        return f"MixtureSource({names}; seed={self.seed}, balance={self.balance!r})"

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What lies at positions of the stream.

        Args:
          positions: int64[N], from 0 on.

        Returns:
          int64[N], the sets, and int64[N], the numbers of the samples in them.
        """
        for position in positions[positions < 0]:
            raise IndexError(f"position {position}; the stream starts at 0")
        epochs, places = np.divmod(positions, len(self))
        seeds = [(self.seed, epoch) for epoch in epochs.tolist()]
        draws = permuted(places, np.full(len(places), len(self)), seeds)
        datasets = np.searchsorted(self._ends, draws, side="right")
        of_set, steps = np.array(self.draws)[datasets], np.array(self._steps)[datasets]
        drawn = epochs * of_set + draws - (np.array(self._ends)[datasets] - of_set)
        rounds, numbers = np.divmod(drawn, steps)
        passes = zip(datasets.tolist(), rounds.tolist(), strict=True)
        return datasets, permuted(numbers, steps, [(self.seed, *each) for each in passes])

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at a position of the stream: as of `StepSource`, and `dataset`, its number."""
        (dataset,), (number,) = self.locate(np.array([position]))
        return {**self.sources[dataset][number], "dataset": int(dataset)}

    def samples(self, datasets: np.ndarray, numbers: np.ndarray, state_dim: int) -> dict[str, Any]:
        """Samples side by side, but for their pixels: as of `StepSource.empty`, and `dataset`,
        int32[N].

        Args:
          datasets, numbers: as of `locate`.
          state_dim: width of the states, at least that of the widest.
        """
        samples = self.sources[0].empty(len(numbers), state_dim)
        samples["dataset"] = datasets.astype(np.int32)
        for source, at in self.by_source(datasets):
            source.fill(samples, at, numbers[at])
        return samples

    def pixels(self, datasets: np.ndarray, frames: np.ndarray) -> dict[str, np.ndarray]:
        """Reads the frames of samples: as of `StepSource.empty_pixels`.

        Args:
          datasets, frames: of the samples.
        """
        pixels = self.sources[0].empty_pixels(len(datasets), self._memory)
        for source, at in self.by_source(datasets):
            source.read_frames(pixels, frames, at)
        return pixels

    def by_source(self, datasets: np.ndarray) -> Iterator[tuple[StepSource, np.ndarray]]:
        """Each set of int[N] with its places there."""
        for dataset in np.unique(datasets).tolist():
            yield self.sources[dataset], np.flatnonzero(datasets == dataset)

    def where(self, dataset: int, row: int) -> str:
        """Names a step in messages, by the `dataset` and `sample_id` of a sample."""
        return self.sources[dataset].index.where(row)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the stream: SHA-256 of all that decides which step lies where, and as what."""
        facts = {
            "algorithm": _ALGORITHM,
            "sources": [source.fingerprint for source in self.sources],
            "weights": [float(weight) for weight in self.weights],
            "seed": self.seed,
            "balance": self.balance,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _memory(self) -> Memory:
        """For the frames of batches."""
        return Memory()

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """Running sums of the draws."""
        return tuple(accumulate(self.draws))

    @cached_property
    def _steps(self) -> tuple[int, ...]:
        return tuple(len(source) for source in self.sources)

    def _check_alike(self, what: str, values: Sequence[object]) -> None:
        """Refuses sources that cannot share a batch."""
        for source, value in zip(self.sources, values, strict=True):
            if value != values[0]:
                raise ValueError(
                    f"{what} of dataset {source.name!r} is {value}, of {self.sources[0].name!r} "
                    f"{values[0]}; a mixture needs one {what} for all"
                )

    def _cameras(self) -> str:
        """What the sets have, for a message."""
        return "; ".join(f"{s.name}: {', '.join(s.index.header.cameras)}" for s in self.sources)


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of `total`, by largest remainder."""
    exact = [total * weight / sum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
