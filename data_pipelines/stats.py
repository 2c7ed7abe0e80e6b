"""Statistics of a dataset's actions and states, and the normalisers made of them. No image is
decoded.

They are taken over the steps of the given table after standardisation, before chunking, so every
step counts once. Take them on the training split and use the same ones for every other split: they
are part of the model.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.datasets import DatasetSpec
from data_pipelines.episodes import EpisodeTable
from lara_jax.transforms import Normalizer, Statistics


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """Statistics of one dataset, in the data's units.

    Attributes:
      dataset: its name.
      steps, episodes: how many were counted.
      action, state: per-dimension statistics.
    """

    dataset: str
    steps: int
    episodes: int
    action: Statistics
    state: Statistics

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return {
            "dataset": self.dataset,
            "steps": self.steps,
            "episodes": self.episodes,
            "action": self.action.to_dict(),
            "state": self.state.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DatasetStatistics":
        """The inverse of `to_dict`."""
        return cls(
            dataset=values["dataset"],
            steps=int(values["steps"]),
            episodes=int(values["episodes"]),
            action=Statistics.from_dict(values["action"]),
            state=Statistics.from_dict(values["state"]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "DatasetStatistics":
        """Reads what `save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def dataset_statistics(table: EpisodeTable) -> DatasetStatistics:
    """Statistics of a table's actions and states."""
    return DatasetStatistics(
        dataset=table.spec.name,
        steps=table.steps,
        episodes=len(table.episodes),
        action=vector_statistics(np.concatenate([e.actions for e in table.episodes])),
        state=vector_statistics(np.concatenate([e.states for e in table.episodes])),
    )


def vector_statistics(values: np.ndarray) -> Statistics:
    """Per-dimension statistics of float[N, D], N at least 1, computed in float64."""
    values = np.asarray(values, np.float64)
    return Statistics(
        min=_floats(values.min(axis=0)),
        max=_floats(values.max(axis=0)),
        mean=_floats(values.mean(axis=0)),
        std=_floats(values.std(axis=0)),
        q01=_floats(np.quantile(values, 0.01, axis=0)),
        q99=_floats(np.quantile(values, 0.99, axis=0)),
    )


def normalizers(spec: DatasetSpec, statistics: DatasetStatistics) -> tuple[Normalizer, Normalizer]:
    """The action's and the state's normaliser, by the dataset's modes."""
    return (
        Normalizer(modes=spec.action_modes, statistics=statistics.action),
        Normalizer(modes=spec.state_modes, statistics=statistics.state),
    )


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(values.tolist())
