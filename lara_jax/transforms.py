"""Transforms that training and serving share, each with its inverse: NumPy in, NumPy out.

A robot's numbers reach the model scaled to about [-1, 1], dimension by dimension, by one of these
modes:

| mode | normalize | unnormalize |
|---|---|---|
| q99 | 2 (x - q01) / (q99 - q01) - 1, clipped to [-1, 1] | (clip(y) + 1) / 2 (q99 - q01) + q01 |
| min_max | 2 (x - min) / (max - min) - 1, not clipped | (clip(y) + 1) / 2 (max - min) + min |
| mean_std | (x - mean) / std | y std + mean |
| binary | 1 where x > 0.5, else 0 | 0 where y < 0.5, else 1 |
| none | x | y |

A constant dimension cannot be scaled: q99 and mean_std leave it as it is (q99 still clips), min_max
makes it 0. The inverse gives the constant back, whatever the model says. A policy is never asked
for more than the data held: on the way out q99 and min_max clip to [-1, 1] first.

Source: the LaRA-VLA release (93b5c03), its state and action transform and its evaluation clients.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Per-dimension statistics of a vector over a dataset, in the data's own units.

    Attributes:
      min, max, mean, std, q01, q99: one float a dimension; std is the population's, q01 and q99 are
        the 1st and 99th percentile.
    """

    min: tuple[float, ...]
    max: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]

    def __post_init__(self) -> None:
        widths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(widths.values())) != 1:
            raise ValueError(f"statistics of different widths: {widths}")

    @property
    def width(self) -> int:
        """Number of dimensions."""
        return len(self.min)

    def to_dict(self) -> dict[str, list[float]]:
        """Lists by name, for JSON."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Statistics":
        """The inverse of `to_dict`."""
        names = [field.name for field in fields(cls)]
        if set(values) != set(names):
            raise ValueError(f"statistics have the fields {sorted(values)}; expected {names}")
        return cls(**{name: tuple(float(x) for x in values[name]) for name in names})


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Scales a vector dimension by dimension, and back.

    With modes ("q99", "none"), q01 = (0, 0) and q99 = (10, 1):
    normalize([5.0, 0.3]) -> [0.0, 0.3] and normalize([20.0, 1.0]) -> [1.0, 1.0].

    Attributes:
      modes: one of "q99", "min_max", "mean_std", "binary", "none" for each dimension.
      statistics: of the data, as wide as `modes`.
    """

    modes: tuple[str, ...]
    statistics: Statistics

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"unknown normalisation mode {mode!r}; known: {', '.join(MODES)}")
        if len(self.modes) != self.statistics.width:
            raise ValueError(
                f"{len(self.modes)} normalisation modes for statistics {self.statistics.width} wide"
            )

    def normalize(self, values: Array) -> Array:
        """Physical units -> the model's.

        Args:
          values: float[..., D] in the data's units.

        Returns:
          float32[..., D].
        """
        return self._apply(values, lambda mode: MODES[mode].normalize)

    def unnormalize(self, values: Array) -> Array:
        """The model's units -> physical ones; the inverse of `normalize` wherever nothing was
        clipped.

        Args:
          values: float[..., D], normalised.

        Returns:
          float32[..., D] in the data's units.
        """
        return self._apply(values, lambda mode: MODES[mode].unnormalize)

    def to_dict(self) -> dict[str, Any]:
        """Lists by name, for JSON."""
        return {"modes": list(self.modes), "statistics": self.statistics.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Normalizer":
        """The inverse of `to_dict`."""
        return cls(
            modes=tuple(values["modes"]), statistics=Statistics.from_dict(values["statistics"])
        )

    @cached_property
    def _groups(self) -> list[tuple[str, Array, dict[str, Array]]]:
        """Each mode in use, its dimensions, and their statistics as float32."""
        groups = []
        for mode in dict.fromkeys(self.modes):
            dims = np.array([i for i, other in enumerate(self.modes) if other == mode])
            of = {n: np.array(v, np.float32)[dims] for n, v in asdict(self.statistics).items()}
            groups.append((mode, dims, of))
        return groups

    def _apply(self, values: Array, function: Callable[[str], "_Scaling"]) -> Array:
        """Runs each dimension through its mode's function."""
        values = np.asarray(values, np.float32)
        if values.shape[-1:] != (len(self.modes),):
            raise ValueError(
                f"a vector of shape {values.shape} for a normaliser {len(self.modes)} wide"
            )
        out = np.empty_like(values)
        for mode, dims, of in self._groups:
            out[..., dims] = function(mode)(values[..., dims], of)
        return out


def pad_state(state: Array, state_dim: int) -> Array:
    """Widens a state to the model's width with zeros on the right: [1, 2], 3 -> [1, 2, 0].

    Args:
      state: float32[..., J].
      state_dim: the model's width, at least J.

    Returns:
      float32[..., state_dim].
    """
    width = state.shape[-1]
    if width > state_dim:
        raise ValueError(f"the data's state is {width} wide, the model's state_dim is {state_dim}")
    return np.pad(state, [(0, 0)] * (state.ndim - 1) + [(0, state_dim - width)])


_Scaling = Callable[[Array, Mapping[str, Array]], Array]


@dataclass(frozen=True)
class _Mode:
    """A way to scale, and back: functions of float32[..., D] and of the statistics by name."""

    normalize: _Scaling
    unnormalize: _Scaling


def _scale(x: Array, low: Array, high: Array, constant: Array) -> Array:
    """[low, high] -> [-1, 1]; `constant` where low equals high."""
    flat = low == high
    return np.where(flat, constant, 2 * (x - low) / np.where(flat, 1, high - low) - 1)


def _unscale(y: Array, low: Array, high: Array) -> Array:
    """[-1, 1] -> [low, high]; `low` where low equals high."""
    return (np.clip(y, -1, 1) + 1) / 2 * (high - low) + low


MODES: Mapping[str, _Mode] = {
    "q99": _Mode(
        lambda x, of: np.clip(_scale(x, of["q01"], of["q99"], x), -1, 1),
        lambda y, of: _unscale(y, of["q01"], of["q99"]),
    ),
    "min_max": _Mode(
        lambda x, of: _scale(x, of["min"], of["max"], np.zeros_like(x)),
        lambda y, of: _unscale(y, of["min"], of["max"]),
    ),
    "mean_std": _Mode(
        lambda x, of: np.where(
            of["std"] == 0, x, (x - of["mean"]) / np.where(of["std"] == 0, 1, of["std"])
        ),
        lambda y, of: y * of["std"] + of["mean"],
    ),
    "binary": _Mode(lambda x, of: x > 0.5, lambda y, of: y >= 0.5),
    "none": _Mode(lambda x, of: x, lambda y, of: y),
}
