"""Statistics: right numbers, JSON, and normalisers by the dataset's modes."""

from pathlib import Path

import numpy as np

from data_pipelines.episodes import load_episodes
from data_pipelines.stats import (
    DatasetStatistics,
    dataset_statistics,
    normalizers,
    vector_statistics,
)
from tests.data_pipelines.handmade import tabletop_record, write_tabletop


def test_vector_statistics() -> None:
    values = np.stack([np.arange(101), np.full(101, 7)], axis=1).astype(np.float32)
    found = vector_statistics(values)
    assert (found.min, found.max, found.mean) == ((0.0, 7.0), (100.0, 7.0), (50.0, 7.0))
    assert (found.q01, found.q99) == ((1.0, 7.0), (99.0, 7.0))
    np.testing.assert_allclose(found.std, [np.sqrt((101**2 - 1) / 12), 0])


def test_dataset_statistics_count_every_step_once(tmp_path: Path) -> None:
    table = load_episodes(write_tabletop(tmp_path), "train")
    records = [tabletop_record(0, 4), tabletop_record(1, 3), tabletop_record(2, 5)]
    found = dataset_statistics(table)
    assert (found.dataset, found.steps, found.episodes) == ("lara_tabletop", 12, 3)
    for key, statistics in (
        ("steps/action", found.action),
        ("steps/observation/state", found.state),
    ):
        values = np.concatenate([record[key] for record in records]).astype(np.float64)
        np.testing.assert_allclose(statistics.mean, values.mean(axis=0))
        np.testing.assert_array_equal(statistics.min, values.min(axis=0))
    found.save(tmp_path / "statistics.json")
    assert DatasetStatistics.load(tmp_path / "statistics.json") == found


def test_normalisers_of_real_data(shared_dir: Path) -> None:
    table = load_episodes(shared_dir / "data/bridge_dataset/1.0.0", "train")
    action, state = normalizers(table.spec, dataset_statistics(table))
    actions = np.concatenate([episode.actions for episode in table.episodes])
    states = np.concatenate([episode.states for episode in table.episodes])
    scaled = action.normalize(actions)
    assert np.abs(scaled).max() == 1
    # About 1 % of the steps lie beyond each of the two percentiles.
    assert 0.01 < (np.abs(scaled[:, :6]) == 1).mean() < 0.03
    inside = (np.abs(scaled[:, :6]) < 1).all(axis=1)
    np.testing.assert_allclose(
        action.unnormalize(scaled[inside]), actions[inside], atol=1e-7, rtol=1e-6
    )
    scaled_state = state.normalize(states)
    assert (scaled_state[:, 6] == 0).all()  # the pad
    assert set(scaled_state[:, 7]) <= {0.0, 1.0}
