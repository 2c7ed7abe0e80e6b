"""The accumulator: right numbers while it holds all, near ones after, however it was fed."""

from collections.abc import Callable

import numpy as np
import pytest

from data_pipelines import accumulator
from data_pipelines.accumulator import Accumulator
from lara_jax.transforms import Normalizer, Statistics

ROWS = 200_000


def fed(values: np.ndarray, chunk: int) -> Accumulator:
    result = Accumulator(values.shape[1])
    for start in range(0, len(values), chunk):
        result.update(values[start : start + chunk])
    return result


def merged(values: np.ndarray, chunk: int) -> Accumulator:
    result = Accumulator(values.shape[1])
    for start in range(0, len(values), chunk):
        result.merge(fed(values[start : start + chunk], 1000))
    return result


def random_rows(rows: int) -> np.ndarray:
    random = np.random.default_rng(rows)
    values = random.normal([0, 1e3, 0], [1, 1e-2, 1e-6], (rows, 3))
    return values.astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 101, 5000])
@pytest.mark.parametrize("feed", [fed, merged])
def test_a_small_set_is_exact(rows: int, feed: Callable[..., Accumulator]) -> None:
    values = random_rows(rows)
    found, wide = feed(values, 37).result(), values.astype(np.float64)
    for name, expected in (
        ("min", wide.min(axis=0)),
        ("max", wide.max(axis=0)),
        ("q01", np.quantile(wide, 0.01, axis=0)),
        ("q99", np.quantile(wide, 0.99, axis=0)),
    ):
        np.testing.assert_array_equal(getattr(found, name), expected, name)
    np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-12, atol=1e-20)
    np.testing.assert_allclose(found.std, wide.std(axis=0), rtol=1e-9)


SETS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda random: random.normal(size=ROWS),
    "sorted": lambda random: np.sort(random.normal(size=ROWS)),
    "falling": lambda random: -np.sort(random.uniform(size=ROWS)),
    "heavy tails": lambda random: np.exp(6 * random.normal(size=ROWS)),
    "mostly zero": lambda random: np.where(
        random.uniform(size=ROWS) < 0.97, 0, random.normal(size=ROWS)
    ),
    "ramps": lambda random: np.tile(np.linspace(0, 1, 50), ROWS // 50),
    "two scales": lambda random: random.normal(np.arange(ROWS) % 2 * 1e6, 1e-3),
    "walk": lambda random: np.cumsum(random.normal(size=ROWS)),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("feed", [fed, merged])
def test_a_large_set_is_near(name: str, feed: Callable[..., Accumulator]) -> None:
    """The ranks of q01 and q99 are within 0.0002 of what they should be."""
    values = SETS[name](np.random.default_rng(0)).astype(np.float32)
    result = feed(values[:, None], 1 << 14).result()
    ordered = np.sort(values)
    for rank, quantile in ((0.01, result.q01[0]), (0.99, result.q99[0])):
        below = np.searchsorted(ordered, np.float32(quantile), "left") / ROWS
        up_to = np.searchsorted(ordered, np.float32(quantile), "right") / ROWS
        assert below - 2e-4 <= rank <= up_to + 2e-4
    np.testing.assert_allclose(result.std, values.std(dtype=np.float64), rtol=1e-9)


@pytest.mark.parametrize("rows", [100, ROWS])
@pytest.mark.parametrize("feed", [fed, merged])
def test_a_constant_dimension_is_constant_in_every_number(
    rows: int, feed: Callable[..., Accumulator]
) -> None:
    values = np.full((rows, 2), [0.1, -1e-7], np.float32)
    found = feed(values, 777).result()
    constant = tuple(values[0].astype(np.float64).tolist())
    assert found == Statistics(
        min=constant, max=constant, mean=constant, std=(0.0, 0.0), q01=constant, q99=constant
    )
    for mode in ("q99", "min_max", "mean_std"):
        normalizer = Normalizer(modes=(mode, mode), statistics=found)
        np.testing.assert_array_equal(
            normalizer.unnormalize(normalizer.normalize(values[:3])), values[:3]
        )


def test_a_few_outliers_do_not_make_a_constant_dimension_less_constant_between_quantiles() -> None:
    values = np.full((ROWS, 1), 0.1, np.float32)
    values[::250] = np.random.default_rng(0).normal(size=(ROWS // 250, 1))
    found = fed(values, 1 << 14).result()
    assert found.q01 == found.q99 == (float(np.float32(0.1)),)
    assert found.std[0] > 0


@pytest.mark.parametrize("cut", [0, 5000, 100_000])
def test_bytes_carry_the_whole_state(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going on from saved bytes, saved at any time, ends where going on without saving ends."""
    monkeypatch.setattr(accumulator, "HELD_ROWS", 20_000)
    values = random_rows(150_000)
    straight, resumed = fed(values[:cut], 5000), fed(values[:cut], 5000)
    if not cut:
        straight, resumed = Accumulator(3), Accumulator(3)
    resumed = Accumulator.from_bytes(resumed.to_bytes())
    for start in range(cut, len(values), 5000):
        for one in (straight, resumed):
            one.update(values[start : start + 5000])
        resumed.to_bytes()  # reading the state does not change it
    assert straight.result() == resumed.result()
    assert straight.count == resumed.count == len(values)


def test_merging_with_an_empty_one_changes_nothing() -> None:
    one, expected = fed(random_rows(50), 10), fed(random_rows(50), 10).result()
    one.merge(Accumulator(3))
    assert one.result() == expected
    empty = Accumulator(3)
    empty.merge(one)
    assert empty.result() == expected


def test_what_was_given_may_be_reused() -> None:
    values, one = random_rows(50), Accumulator(3)
    one.update(values)
    expected = fed(random_rows(50), 50).result()
    values[:] = 0
    assert one.result() == expected


def test_vectors_of_no_width_count_too() -> None:
    one = Accumulator(0)
    one.update(np.zeros((ROWS, 0), np.float32))
    assert Accumulator.from_bytes(one.to_bytes()).result().width == 0


def test_bad_input_is_named() -> None:
    one = Accumulator(3)
    with pytest.raises(ValueError, match="no steps"):
        one.result()
    with pytest.raises(ValueError, match=r"shape \(5, 2\); expected \[n, 3\]"):
        one.update(np.zeros((5, 2), np.float32))
    for bad in (np.nan, np.inf, -np.inf):
        values = random_rows(5)
        values[4, 2] = bad
        with pytest.raises(ValueError, match=f"dimension 2 is {bad} in row 4"):
            one.update(values)
    assert one.count == 0
    with pytest.raises(ValueError, match="2 wide merged into one of 3"):
        one.merge(Accumulator(2))
