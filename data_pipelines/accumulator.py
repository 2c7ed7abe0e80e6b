"""Statistics of vectors that come in parts: mergeable, in memory that does not grow.

    Accumulator(7)  .update(float32[n, 7])  .merge(another)  .result() -> min max mean std q01 q99

Mean and variance follow Chan, about a value of the data, so that a constant dimension has a
standard deviation of exactly 0. Up to HELD_ROWS rows are kept and their quantiles are exact,
interpolated as `numpy.quantile` does. Beyond, each dimension goes into a t-digest of Apache
DataSketches. Of that library's sketches it is the one without randomness: KLL and REQ toss coins
that cannot be seeded, so that two runs, or one that was killed and resumed, would normalise
differently. It is also the finest at the ends: at SKETCH_K the ranks of q01 and q99 were within
0.0001 of the truth on sorted, tied, heavy-tailed and bimodal sets of a million, also when merged
from a hundred parts, where a KLL sketch of the same size (40 kB) has a rank error of 0.0007. Its
quantiles are rounded to float32, which the data is.

Source: Chan, Golub and LeVeque 1983, updating formulae for variances; Dunning and Ertl 2019, the
t-digest.
"""

import io
from collections.abc import Sequence
from typing import Any

import datasketches
import numpy as np

from lara_jax.transforms import Statistics

SKETCH_K = 2000
HELD_ROWS = 1 << 16
QUANTILES = (0.01, 0.99)


class Accumulator:
    """Statistics of vectors that come in parts.

    Args:
      width: D.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self._low, self._high = np.full(width, np.inf), np.full(width, -np.inf)
        self._mean, self._squares = np.zeros(width), np.zeros(width)
        # All rows so far; None once they were poured into sketches, one for each dimension.
        self._held: list[np.ndarray] | None = []
        self._sketches: list[Any] = []

    def update(self, values: np.ndarray) -> None:
        """Counts more vectors.

        Args:
          values: float32[n, D].

        Raises:
          ValueError: they are not D wide, or one is not finite; nothing was counted.
        """
        if values.ndim != 2 or values.shape[1] != self.width:
            raise ValueError(f"values of shape {values.shape}; expected [n, {self.width}]")
        bad = first_non_finite(values)
        if bad is not None:
            raise ValueError(f"dimension {bad[1]} is {values[bad]} in row {bad[0]}")
        if not len(values):
            return
        wide = values.astype(np.float64)
        from_first = wide - wide[0]
        from_mean = from_first - from_first.mean(axis=0)
        moments = wide[0] + from_first.mean(axis=0), np.square(from_mean).sum(axis=0)
        self._add_moments(len(wide), wide.min(axis=0), wide.max(axis=0), *moments)
        self._add_rows([values.astype(np.float32)])

    def merge(self, other: "Accumulator") -> None:
        """Counts all that another one has counted."""
        if other.width != self.width:
            raise ValueError(f"an accumulator {other.width} wide merged into one of {self.width}")
        if not other.count:
            return
        self._add_moments(other.count, other._low, other._high, other._mean, other._squares)
        if other._held is not None:
            self._add_rows(other._held)
            return
        self._pour()
        for mine, theirs in zip(self._sketches, other._sketches, strict=True):
            mine.merge(theirs)
            mine.compress()

    def result(self) -> Statistics:
        """The statistics.

        Raises:
          ValueError: nothing was counted.
        """
        if not self.count:
            raise ValueError("no steps to take statistics of")
        if self._held is None:
            found = [[sketch.get_quantile(q) for sketch in self._sketches] for q in QUANTILES]
            low, high = np.array(found, np.float32).reshape(2, self.width)
        else:
            rows = np.concatenate(self._held).astype(np.float64)
            low, high = np.quantile(rows, QUANTILES, axis=0)
        std = np.sqrt(self._squares / self.count)
        return Statistics(
            min=_floats(self._low),
            max=_floats(self._high),
            mean=_floats(self._mean),
            std=_floats(std),
            q01=_floats(low),
            q99=_floats(high),
        )

    def to_bytes(self) -> bytes:
        """The whole state; going on from it gives what going on from this one gives."""
        sketches = [sketch.serialize() for sketch in self._sketches]
        buffer = io.BytesIO()
        np.savez(
            buffer,
            count=self.count,
            moments=np.stack([self._low, self._high, self._mean, self._squares]),
            holds_all=self._held is not None,
            held=np.concatenate([np.zeros((0, self.width), np.float32), *(self._held or ())]),
            sizes=np.array([len(sketch) for sketch in sketches], np.int64),
            sketches=np.frombuffer(b"".join(sketches), np.uint8),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Accumulator":
        """The inverse of `to_bytes`."""
        with np.load(io.BytesIO(data)) as state:
            moments, held, sketches = state["moments"], state["held"], state["sketches"].tobytes()
            self = cls(moments.shape[1])
            self.count, holds_all = int(state["count"]), bool(state["holds_all"])
            ends = np.cumsum(state["sizes"]).tolist()
        self._low, self._high, self._mean, self._squares = moments
        self._held = [held] if holds_all else None
        self._sketches = [
            datasketches.tdigest_double.deserialize(sketches[start:end])
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        return self

    def _add_moments(self, count: int, low: Any, high: Any, mean: Any, squares: Any) -> None:
        """Chan's update: `count` more vectors of this range, mean and sum of squared deviations."""
        self._low, self._high = np.minimum(self._low, low), np.maximum(self._high, high)
        total = self.count + count
        step = mean - self._mean if self.count else np.zeros(self.width)
        self._mean = self._mean + step * (count / total) if self.count else np.array(mean)
        self._squares = self._squares + squares + step**2 * (self.count * count / total)
        self.count = total

    def _add_rows(self, rows: Sequence[np.ndarray]) -> None:
        """Rows, already counted, for the quantiles."""
        if self._held is not None:
            self._held.extend(rows)
            if self.count > HELD_ROWS:
                self._pour()
            return
        columns = np.ascontiguousarray(np.concatenate(rows).astype(np.float64).T)
        for sketch, column in zip(self._sketches, columns, strict=True):
            sketch.update(column)
            # A digest compresses itself when it is saved: do it always, so that saving one does
            # not change what comes after.
            sketch.compress()

    def _pour(self) -> None:
        """Held rows -> sketches."""
        if self._held is None:
            return
        held, self._held = self._held, None
        self._sketches = [datasketches.tdigest_double(SKETCH_K) for _ in range(self.width)]
        if held:
            self._add_rows(held)


def first_non_finite(values: np.ndarray) -> tuple[int, int] | None:
    """Row and dimension of the first value of float[n, D] that is not finite, None without one."""
    finite = np.isfinite(values)
    if finite.all():
        return None
    row, dimension = np.argwhere(~finite)[0].tolist()
    return row, dimension


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())
