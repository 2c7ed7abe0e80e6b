"""The masks against the drawing in the module's docstring."""

import jax.numpy as jnp
import numpy as np

from lara_jax.models import masks


def drawn() -> np.ndarray:
    """The x marks of the docstring's drawing."""
    rows = [
        line[13:40].split()
        for line in masks.__doc__.splitlines()
        if line.startswith(("    pad", "    text", "    slot", "    next", "    end"))
    ]
    return np.array([[mark == "x" for mark in row] for row in rows])


def test_whole_sequence_is_as_drawn():
    valid = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1]], bool)
    block = jnp.array([[0, 0, 0, 0, 0, 1, 1, 0]], bool)
    index = jnp.arange(8)
    mask = masks.attention_mask(index, index, valid, valid, block, block)
    np.testing.assert_array_equal(mask[0], drawn())


def test_segments_are_cut_out_of_the_whole():
    valid = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1]], bool)
    block = jnp.array([[0, 0, 0, 0, 0, 1, 1, 0]], bool)
    index = jnp.arange(8)
    part = masks.attention_mask(index[5:], index, valid[:, 5:], valid, block[:, 5:], block)
    np.testing.assert_array_equal(part[0], drawn()[5:])


def test_slot_sees_prefix_earlier_slots_and_itself():
    prefix = jnp.array([[False, True, True]])
    for step, slots in enumerate(([0, 0, 0], [1, 0, 0], [1, 1, 0])):
        mask = masks.slot_mask(prefix, 3, jnp.asarray(step))
        assert mask.shape == (1, 1, 7)
        assert mask[0, 0].astype(int).tolist() == [0, 1, 1, *slots, 1]
