"""Positions by example, rotations by their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.models import rope


def test_mrope_example():
    """Two pads, two words, a 2 x 3 image, a word, another image, a word, a pad."""
    kinds = "..ttiiiiiitiiiiiit."
    valid = jnp.array([[k != "." for k in kinds]])
    image = jnp.array([[k == "i" for k in kinds]])
    t, h, w = rope.mrope_positions(image, valid, (2, 3))[:, 0].tolist()
    assert t == [1, 1, 0, 1, *[2] * 6, 5, *[6] * 6, 9, 1]
    assert h == [1, 1, 0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 6, 7, 7, 7, 9, 1]
    assert w == [1, 1, 0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8, 9, 1]


def test_mrope_passes_over_a_missing_view():
    """A view whose tokens are not valid takes no room."""
    image = jnp.array([[0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
    valid = jnp.array([[1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]], bool)
    t, h, w = rope.mrope_positions(image, valid, (2, 2))[:, 0].tolist()
    assert [p for p, ok in zip(t, valid[0], strict=True) if ok] == [0, 1, 2, 2, 2, 2, 4]
    assert h[6:10] == [2, 2, 3, 3] and w[6:10] == [2, 3, 2, 3]


def test_sequential_example():
    valid = jnp.array([[0, 0, 1, 1, 1, 0]], bool)
    assert rope.sequential_positions(valid)[:, 0].tolist() == [[1, 1, 0, 1, 2, 3]] * 3


def test_text_rope_without_images_is_ordinary_rope():
    positions = jnp.broadcast_to(jnp.arange(6), (3, 1, 6))
    cos, sin = rope.text_rope(positions, 16, 1e4, (4, 2, 2))
    angle = np.arange(6)[:, None] / 1e4 ** (np.arange(8) / 8)
    np.testing.assert_allclose(cos[0, :, 0, :8], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0, 8:], np.sin(angle), atol=1e-6)


@pytest.mark.parametrize("section", [(24, 20, 20), (6, 5, 5), (3, 3, 2)])
def test_sections_are_interleaved(section):
    """Moving one of the three positions turns that many frequencies, at every third place."""
    half = sum(section)
    base = jnp.zeros((3, 1, 1), jnp.int32)
    for axis, count in enumerate(section):
        _, sin = rope.text_rope(base.at[axis].set(1), 2 * half, 1e4, section)
        turned = np.flatnonzero(np.asarray(sin[0, 0, 0, :half]))
        assert len(turned) == count
        if axis:
            assert turned.tolist() == list(range(axis, 3 * count, 3))


def test_rotation_keeps_lengths_and_depends_on_distance():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(i: int, j: int) -> float:
        turned = [
            rope.rotate(x, rope.text_rope(jnp.full((3, 1, 1), at), 16, 1e4, (4, 2, 2)))
            for x, at in ((q, i), (k, j))
        ]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), jnp.linalg.norm(q), rtol=1e-5)
        return float((turned[0] * turned[1]).sum())

    np.testing.assert_allclose(score(3, 1), score(9, 7), rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_vision_rope_turns_half_by_row_half_by_column():
    cos, _ = rope.vision_rope((4, 4), 2, 8)
    rows, columns = rope.merge_order((4, 4), 2)
    np.testing.assert_allclose(cos[0, :, 0, 0], np.cos(rows), atol=1e-6)
    np.testing.assert_allclose(cos[0, :, 0, 2], np.cos(columns), atol=1e-6)
    np.testing.assert_array_equal(cos[..., :4], cos[..., 4:])
