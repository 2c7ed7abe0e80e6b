"""Statistics shard by shard: what the index of the same files gives."""

import pickle
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.convert.shard_statistics import Totals, shard_totals
from data_pipelines.index.parts import index_source
from data_pipelines.statistics import DatasetStatistics, index_statistics
from tests.data_pipelines.convert import made_source
from tests.data_pipelines.convert.made_source import SPEC, MadeSource


@pytest.fixture
def source(tmp_path: Path) -> MadeSource:
    return made_source.make(tmp_path / "source")


def assert_equal(found: DatasetStatistics, expected: DatasetStatistics) -> None:
    """All to the bit, but mean and std, in which the order of adding up shows."""
    for vector in ("action", "state"):
        ours, theirs = getattr(found, vector), getattr(expected, vector)
        for name in ("mean", "std"):
            values = getattr(ours, name), getattr(theirs, name)
            np.testing.assert_allclose(*values, rtol=1e-12, atol=1e-15)
        same = {name: getattr(theirs, name) for name in ("mean", "std")}
        found = replace(found, **{vector: replace(ours, **same)})
    assert found == expected


@pytest.mark.parametrize(
    ("filters", "stride"), [((), 1), (("pause",), 1), (("pause", "bad_frame"), 3)]
)
def test_equals_the_statistics_of_the_index(
    source: MadeSource, tmp_path: Path, filters: tuple[str, ...], stride: int
) -> None:
    index = index_source(source, tmp_path / "index", workers=1, max_bad_fraction=1.0)
    expected = index_statistics(index, filters=filters, stride=stride)
    assert expected.steps == {0: 15, 1: 12, 2: 7}[len(filters)]
    for order in permutations(range(3)):
        totals = Totals.empty(SPEC)
        for shard in order:
            part = shard_totals(source, shard, filters=filters, stride=stride)
            totals, part = pickle.loads(pickle.dumps((totals, part)))
            totals.merge(part)
        assert_equal(totals.result(SPEC, stride=stride), expected)


def test_a_value_that_is_not_finite(source: MadeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(source.episodes(1))
    states = entry.states.copy()
    states[2, 5] = np.inf
    broken = replace(entry, states=states)
    monkeypatch.setattr(MadeSource, "episodes", lambda *_: iter([broken]))
    with pytest.raises(
        ValueError, match="made: states, dimension 5: inf in frames-1, record 0, step 3"
    ):
        shard_totals(source, 1)


def test_an_unknown_filter(source: MadeSource) -> None:
    with pytest.raises(
        ValueError, match=r"unknown filters \['pauses'\]; known: pause, no_language"
    ):
        shard_totals(source, 0, filters=["pauses"])
