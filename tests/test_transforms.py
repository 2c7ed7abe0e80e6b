"""Normalisation: the reference's formulas, constant dimensions, and inverses."""

import json

import numpy as np
import pytest

from lara_jax.transforms import Normalizer, Statistics, pad_state

# Three dimensions; the last one is constant at 3.
STATISTICS = Statistics(
    min=(-2.0, 0.0, 3.0),
    max=(2.0, 8.0, 3.0),
    mean=(0.5, 4.0, 3.0),
    std=(0.25, 2.0, 0.0),
    q01=(-1.0, 1.0, 3.0),
    q99=(1.0, 5.0, 3.0),
)


def normalizer(*modes: str) -> Normalizer:
    return Normalizer(modes=modes if len(modes) == 3 else modes * 3, statistics=STATISTICS)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("q99", [0.5, 2.0, 0.25], [0.5, -0.5, 0.25]),  # a constant dimension stays raw
        ("q99", [-7.0, 9.0, 3.0], [-1.0, 1.0, 1.0]),  # clipped, the constant one too
        ("min_max", [1.0, 2.0, 3.0], [0.5, -0.5, 0.0]),  # a constant dimension becomes 0
        ("min_max", [4.0, -8.0, 9.0], [2.0, -3.0, 0.0]),  # not clipped
        ("mean_std", [1.0, 2.0, 3.5], [2.0, -1.0, 3.5]),  # a constant dimension stays raw
        ("binary", [0.5, 0.51, -3.0], [0.0, 1.0, 0.0]),
        ("none", [0.5, -9.0, 3.0], [0.5, -9.0, 3.0]),
    ],
)
def test_normalize_follows_the_formulas(
    mode: str, values: list[float], expected: list[float]
) -> None:
    result = normalizer(mode).normalize(np.array(values, np.float32))
    np.testing.assert_array_equal(result, np.array(expected, np.float32), strict=True)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("q99", [0.5, -0.5, 0.25], [0.5, 2.0, 3.0]),
        ("q99", [-7.0, 1.5, 0.0], [-1.0, 5.0, 3.0]),  # never beyond what the data held
        ("min_max", [2.0, -0.5, 0.0], [2.0, 2.0, 3.0]),
        ("mean_std", [2.0, -1.0, 7.0], [1.0, 2.0, 3.0]),
        ("binary", [0.49, 0.5, 3.0], [0.0, 1.0, 1.0]),
        ("none", [0.5, -9.0, 3.0], [0.5, -9.0, 3.0]),
    ],
)
def test_unnormalize_follows_the_formulas(
    mode: str, values: list[float], expected: list[float]
) -> None:
    result = normalizer(mode).unnormalize(np.array(values, np.float32))
    np.testing.assert_array_equal(result, np.array(expected, np.float32), strict=True)


@pytest.mark.parametrize("mode", ["q99", "min_max", "mean_std", "none"])
def test_the_two_are_inverses_where_nothing_is_clipped(mode: str) -> None:
    random = np.random.default_rng(0)
    values = random.uniform([-1, 1, 3], [1, 5, 3], (4, 5, 3)).astype(np.float32)
    there = normalizer(mode)
    np.testing.assert_allclose(there.unnormalize(there.normalize(values)), values, atol=1e-6)
    scaled = random.uniform(-1, 1, (4, 5, 2)).astype(np.float32)
    constant = there.normalize(np.full((4, 5, 3), 3, np.float32))[..., 2:]
    scaled = np.concatenate([scaled, constant], axis=-1)
    np.testing.assert_allclose(there.normalize(there.unnormalize(scaled)), scaled, atol=1e-6)


def test_binary_is_its_own_inverse_on_its_two_values() -> None:
    values, there = np.array([[0, 1, 1], [1, 0, 0]], np.float32), normalizer("binary")
    np.testing.assert_array_equal(there.normalize(values), values)
    np.testing.assert_array_equal(there.unnormalize(there.normalize(values)), values)


@pytest.mark.parametrize("mode", ["q99", "min_max", "mean_std"])
def test_a_dimension_is_constant_if_float32_cannot_tell_its_bounds_apart(mode: str) -> None:
    low, high = (1.0,), (1.0 + 1e-9,)
    statistics = Statistics(min=low, max=high, mean=low, std=(1e-50,), q01=low, q99=high)
    there = Normalizer(modes=(mode,), statistics=statistics)
    scaled = there.normalize(np.array([[1.0], [0.5]], np.float32))
    np.testing.assert_array_equal(scaled, [[0], [0]] if mode == "min_max" else [[1], [0.5]])
    back = there.unnormalize(np.array([[0.3], [-1.0]], np.float32))
    np.testing.assert_array_equal(back, [[1.0], [1.0]])


def test_modes_are_per_dimension_and_the_input_is_left_alone() -> None:
    values = np.array([[0.5, 0.7, 3.0], [1.0, 0.2, 3.0]], np.float32)
    before = values.copy()
    result = normalizer("q99", "binary", "none").normalize(values)
    np.testing.assert_array_equal(result, np.array([[0.5, 1, 3], [1, 0, 3]], np.float32))
    np.testing.assert_array_equal(values, before)


def test_json_round_trip() -> None:
    original = normalizer("q99", "binary", "none")
    assert Normalizer.from_dict(json.loads(json.dumps(original.to_dict()))) == original


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="'q98'; known: q99, min_max, mean_std, binary, none"):
        normalizer("q98")
    with pytest.raises(ValueError, match="2 normalisation modes for statistics 3 wide"):
        Normalizer(modes=("q99", "q99"), statistics=STATISTICS)
    with pytest.raises(ValueError, match=r"shape \(4, 2\) for a normaliser 3 wide"):
        normalizer("q99").normalize(np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match="different widths"):
        Statistics.from_dict(STATISTICS.to_dict() | {"q01": [0.0]})
    with pytest.raises(ValueError, match="have the fields"):
        Statistics.from_dict({"mean": [0.0]})


def test_pad_state() -> None:
    np.testing.assert_array_equal(
        pad_state(np.ones((2, 3), np.float32), 5),
        np.array([[1, 1, 1, 0, 0]] * 2, np.float32),
        strict=True,
    )
    with pytest.raises(ValueError, match="state is 3 wide, the model's state_dim is 2"):
        pad_state(np.ones(3, np.float32), 2)
