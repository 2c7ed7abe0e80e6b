"""The mixture: exact shares, equal turns for all steps, no aliasing, one stream for all hosts."""

import dataclasses
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from data_pipelines.mixture import MixtureSource
from data_pipelines.permutation import permuted
from data_pipelines.sampling import StepSource
from tests.data_pipelines.small_index import make_index


def mixture(
    folder: Path, lengths: Sequence[Sequence[int]], weights: Sequence[float], **changes: Any
) -> MixtureSource:
    """Sets "set 0", "set 1", ... with episodes of these lengths."""
    sources = [
        StepSource(
            index=make_index(folder / str(i), f"set {i}", episodes),
            views=("primary",),
            action_horizon=2,
        )
        for i, episodes in enumerate(lengths)
    ]
    return MixtureSource(**{"sources": tuple(sources), "weights": tuple(weights)} | changes)


def order(length: int, *seed: int, places: Sequence[int] | None = None) -> list[int]:
    """Where indices, or all of them, go in a permutation."""
    indices = np.arange(length) if places is None else np.array(places)
    return permuted(indices, np.full(len(indices), length), [seed] * len(indices)).tolist()


def located(mix: MixtureSource, positions: range) -> list[tuple[int, int]]:
    datasets, numbers = mix.locate(np.array(positions))
    return list(zip(datasets.tolist(), numbers.tolist(), strict=True))


def counts(mix: MixtureSource, epochs: int) -> list[Counter[int]]:
    """How often each step of each set comes up."""
    found: list[Counter[int]] = [Counter() for _ in mix.sources]
    for dataset, number in located(mix, range(epochs * len(mix))):
        found[dataset][number] += 1
    return found


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 100, 257])
def test_a_permutation_is_one_and_depends_on_its_seed(length: int) -> None:
    orders = {tuple(order(length, seed, 7)) for seed in range(40)}
    for found in orders:
        assert sorted(found) == list(range(length))
    assert len(orders) == (40 if length > 10 else len(orders))
    for index in (-1, length):
        with pytest.raises(IndexError, match=f"index {index} of {length}"):
            order(length, 0, places=[0, index])


def test_permutations_side_by_side_are_those_apart() -> None:
    lengths, seeds = np.tile([7, 300, 10**9], 20), [(1,), (2, 5), (3,), (1,)] * 15
    indices = np.arange(60) % lengths
    found = permuted(indices, lengths, seeds)
    for index, length, seed, place in zip(indices, lengths.tolist(), seeds, found, strict=True):
        assert order(length, *seed, places=[index]) == [place]
    assert len(permuted(np.arange(0), np.arange(0), [])) == 0


def test_every_place_of_a_permutation_is_as_likely() -> None:
    length, seeds = 50, 2000
    table = np.zeros((length, length))
    for seed in range(seeds):
        table[np.arange(length), order(length, seed)] += 1
    expected = seeds / length
    chi_square = ((table - expected) ** 2 / expected).sum() / (length - 1) ** 2
    assert 0.9 < chi_square < 1.1
    places = np.array(order(10_000, 3))
    for lag in (1, 2, 7, 100):
        assert abs(np.corrcoef(places[:-lag], places[lag:])[0, 1]) < 0.05


def test_large_permutations_and_their_values_are_fixed() -> None:
    # A run's order must not change with a release: these values are part of the format.
    assert order(10, 0) == [9, 6, 1, 0, 2, 3, 7, 8, 4, 5]
    assert order(2**40, 1, 2, places=[0, 1, 2**40 - 1]) == [603846050613, 41599304295, 378928624597]
    found = set(order(2**40, 1, 2, places=range(1000)))
    assert len(found) == 1000 and max(found) > 2**39


def test_a_weight_is_how_often_each_step_comes_up_in_an_epoch(tmp_path: Path) -> None:
    mix = mixture(tmp_path, [(4, 2), (3,), (5, 5), (4,)], (1, 2, 0.5, 3 / 4))
    assert mix.draws == (6, 6, 5, 3)
    assert len(mix) == 20
    for epochs, lengths in ((1, (1, 2, None, None)), (2, (2, 4, 1, None)), (4, (4, 8, 2, 3))):
        for found, steps, times in zip(counts(mix, epochs), (6, 3, 10, 4), lengths, strict=True):
            every = {number: found[number] for number in range(steps)}
            assert max(every.values()) - min(every.values()) <= 1
            if times is not None:
                assert set(every.values()) == {times}


def test_shares_by_weight_alone(tmp_path: Path) -> None:
    mix = mixture(tmp_path, [(4, 2), (3,), (5, 6)], (1, 1, 2), balance="none")
    assert len(mix) == 20
    assert mix.draws == (5, 5, 10)
    for found, steps in zip(counts(mix, 3), (6, 3, 11), strict=True):
        every = [found[number] for number in range(steps)]
        assert max(every) - min(every) <= 1
    weights = (0.3, 0.3, 0.4)
    mix = mixture(tmp_path / "b", [(4,), (4,), (3,)], weights, balance="none")
    assert mix.draws == (3, 3, 5)  # of 3.3, 3.3, 4.4: the largest remainder


def test_epochs_differ_and_seeds_differ(tmp_path: Path) -> None:
    mix = mixture(tmp_path, [(30,), (20,)], (1, 1))
    other = mixture(tmp_path / "b", [(30,), (20,)], (1, 1), seed=1)
    epochs = [located(mix, range(50 * e, 50 * e + 50)) for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert located(other, range(50)) != epochs[0]
    again = pickle.loads(pickle.dumps(mix))
    assert located(again, range(50)) == epochs[0]
    # A position's sample does not depend on what is looked up with it.
    assert [located(mix, range(p, p + 1)) for p in range(50)] == [[each] for each in epochs[0]]


def test_an_epoch_with_a_part_of_a_set_takes_it_from_all_over(tmp_path: Path) -> None:
    mix = mixture(tmp_path, [(200,)], (0.1,))
    for epoch in range(3):
        numbers = sorted(n for _, n in located(mix, range(20 * epoch, 20 * epoch + 20)))
        assert len(set(numbers)) == 20 and numbers[-1] - numbers[0] > 100


@pytest.mark.parametrize("hosts", [2, 4])
def test_strided_hosts_see_both_of_two_equal_sets(tmp_path: Path, hosts: int) -> None:
    mix = mixture(tmp_path, [(200,), (200,)], (1, 1))
    places, _ = mix.locate(np.arange(4 * len(mix)))
    for host in range(hosts):
        assert 0.4 < places[host::hosts].mean() < 0.6
    # At any time, too.
    assert all(0.3 < part.mean() < 0.7 for part in places.reshape(-1, 100))

    # The same with grain's own mixing: a host sees one set alone.
    sets = [
        grain.MapDataset.range(200).map(lambda _, number=number: number).repeat()
        for number in range(2)
    ]
    plain = grain.MapDataset.mix(sets, weights=[1, 1])
    assert [plain[position] for position in range(8)] != [plain[0]] * 8
    for host in range(hosts):
        ours = plain[host::hosts]
        assert {ours[position] for position in range(100)} in ({0}, {1})


def test_samples_carry_their_dataset_and_row(tmp_path: Path) -> None:
    mix = mixture(tmp_path, [(4, 2), (3,)], (1, 1))
    found = [mix[position] for position in range(9)]
    for sample in found:
        name = f"set {sample['dataset']}"
        assert sample["instruction"].startswith(name)
        index = mix.sources[sample["dataset"]].index
        np.testing.assert_array_equal(sample["state"], index.states[sample["sample_id"]])
    ids = [(sample["dataset"], sample["sample_id"]) for sample in found]
    assert sorted(ids) == [(0, row) for row in range(6)] + [(1, row) for row in range(3)]
    assert mix.where(0, 5).endswith("0/frames.bin, record 1, step 1")
    with pytest.raises(IndexError, match="position -1"):
        mix[-1]


def test_the_fingerprint_is_that_of_the_stream(tmp_path: Path) -> None:
    def of(weights: Sequence[float], **changes: Any) -> str:
        return mixture(tmp_path, [(4, 2), (3,)], weights, **changes).fingerprint

    same = of((1, 2))
    assert same == of((1.0, 2.0)) and len(same) == 64
    other = [of((1, 3)), of((1, 2), seed=1), of((1, 2), balance="none")]
    other += [mixture(tmp_path / "b", [(4, 2), (4,)], (1, 2)).fingerprint]
    assert len({same, *other}) == 5


def test_memory_does_not_grow_with_the_stream_or_the_sets(tmp_path: Path) -> None:
    (source,) = mixture(tmp_path, [(4, 2)], (1,)).sources
    few = MixtureSource(sources=(source,), weights=(1,))
    index = source.index
    headers = [dataclasses.replace(index.header, dataset=f"set {i}") for i in range(500)]
    sources = tuple(
        dataclasses.replace(source, index=dataclasses.replace(index, header=header))
        for header in headers
    )
    many = MixtureSource(sources=sources, weights=(1e7,) * 500)
    assert len(many) == 500 * 6 * 10**7
    far = range(10**15, 10**15 + 3)
    assert {dataset for dataset, _ in located(many, far)} <= set(range(500))
    assert {dataset for dataset, _ in located(few, far)} == {0}
    assert not any("rows" in each.index.__dict__ for each in sources)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ((1,), {}, "2 datasets and 1 weights"),
        ((1, 0), {}, "'set 1': weight 0; it must be positive"),
        ((1, float("nan")), {}, "'set 1': weight nan"),
        ((1, 1), {"balance": "length"}, "balance is 'length'; known: size, none"),
        ((), {"sources": ()}, "0 datasets and 0 weights"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path, weights: Sequence[float], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(tmp_path, [(3,), (4,)], weights, **changes)


@pytest.mark.parametrize(("balance", "needed"), [("size", 0.167), ("none", 1 / 6)])
def test_a_set_that_never_comes_up_is_an_error(tmp_path: Path, balance: str, needed: float) -> None:
    with pytest.raises(ValueError, match=r"'set 1': .* 0\.05 none of its 3 .* weight of 0\.167"):
        _ = mixture(tmp_path / "a", [(4,), (3,)], (1, 0.05), balance=balance).draws
    mix = mixture(tmp_path / "b", [(4,), (3,)], (1, needed + 1e-3), balance=balance)
    assert mix.draws[1] == 1


def test_sets_that_cannot_share_a_batch_are_named(tmp_path: Path) -> None:
    indexes = [
        make_index(tmp_path / "a", "a"),
        make_index(tmp_path / "b", "b", sizes={"image": (8, 8)}),
        make_index(tmp_path / "c", "c", action_dim=6),
    ]

    def mix(numbers: Sequence[int], settings: Sequence[dict[str, Any]] = ({}, {})) -> MixtureSource:
        sources = tuple(
            StepSource(
                **{"index": indexes[n], "views": ("primary",), "action_horizon": 2} | changes
            )
            for n, changes in zip(numbers, settings, strict=True)
        )
        return MixtureSource(sources=sources, weights=(1,) * len(sources))

    with pytest.raises(ValueError, match=r"image_size of dataset 'b' is \(8, 8\), of 'a' \(16"):
        mix((0, 1))
    assert len(mix((0, 1), ({"image_size": (8, 8)},) * 2)) == 24
    with pytest.raises(ValueError, match="action_dim of dataset 'c' is 6, of 'a' 7"):
        mix((0, 2))
    assert len(mix((0, 2), ({"action_dim": 7},) * 2)) == 24
    with pytest.raises(ValueError, match="views of dataset 'a' is"):
        mix((0, 0), ({}, {"views": ("image",)}))
    with pytest.raises(ValueError, match="action_horizon of dataset 'a' is 3, of 'a' 2"):
        mix((0, 0), ({}, {"action_horizon": 3}))
    with pytest.raises(ValueError, match=r"no dataset has the view\(s\) \['wrst'\]; a: image"):
        mix((0, 0), ({"views": ("primary", "wrst")},) * 2)
    empty = make_index(tmp_path / "d", "d", (2,), flags=[1, 3])
    empty_source = StepSource(index=empty, views=("primary",), action_horizon=2, filters=("pause",))
    with pytest.raises(ValueError, match="no step to learn from; 2 rows were left out"):
        _ = MixtureSource(sources=(empty_source,), weights=(1,)).draws
