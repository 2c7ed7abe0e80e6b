"""Statistics of hidden states on vectors whose answer is known."""

import numpy as np
import pytest

from lara_jax.evals.latents import drift, effective_rank, nearest, slot_cosine


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_effective_rank_counts_equal_directions(directions: int) -> None:
    vectors = np.concatenate([np.eye(8)[:directions], -np.eye(8)[:directions]])
    assert effective_rank(100 + 3 * vectors) == pytest.approx(directions)


def test_effective_rank_is_the_entropy_of_the_singular_values() -> None:
    vectors = np.diag([3.0, 1.0])[[0, 0, 1, 1]] * np.array([[1], [-1], [1], [-1]])
    share = np.array([0.75, 0.25])  # singular values 3 sqrt 2 and sqrt 2
    assert effective_rank(vectors) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_effective_rank_of_equal_vectors_is_one() -> None:
    assert effective_rank(np.full((5, 3), 0.1, np.float32)) == 1
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        effective_rank(np.ones((1, 3)))


def test_cosine_of_slots() -> None:
    same = np.ones((2, 3, 4))
    assert slot_cosine(same) == pytest.approx(1)
    assert slot_cosine(np.eye(3)[None]) == pytest.approx(0)
    # 0, 90 and 180 degrees: the pairs have cosines 0, -1 and 0.
    assert slot_cosine(np.array([[[1, 0], [0, 5], [-2, 0]]])) == pytest.approx(-1 / 3)
    with pytest.raises(ValueError, match="K at least 2"):
        slot_cosine(np.ones((2, 1, 4)))


def test_drift_is_a_turn_not_a_growth() -> None:
    before = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    assert drift(7 * before, before) == pytest.approx(0)
    assert drift(before[:, ::-1], before) == pytest.approx(1)
    assert drift(before * [[[1], [-1]]], before) == pytest.approx(1)  # one of two turned around
    with pytest.raises(ValueError, match="before"):
        drift(before, before[:, :1])


def test_nearest_is_by_absolute_difference() -> None:
    seen = np.array([[0.0, 0.0], [10.0, 0.0], [3.0, 3.0]])
    imagined = np.array([[1.0, 0.0], [4.0, 3.0], [3.0, 3.0]])
    np.testing.assert_array_equal(nearest(imagined, seen), [0, 2, 2])
