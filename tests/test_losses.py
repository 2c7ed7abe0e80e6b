"""The three losses by hand-counted examples."""

import jax.numpy as jnp
import numpy as np

from lara_jax import losses


def test_token_loss_counts_marked_tokens_only():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 1e-9, 1e-9]]]))
    ids = jnp.array([[0, 1, 2]])
    result = losses.token_loss(logits, ids, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(result.total, -np.log(0.5) - np.log(0.8), rtol=1e-5)
    assert result.count == 2


def test_visual_loss_leaves_out_rows_without_a_next_frame():
    imagined = jnp.array([[[1.0, 2.0]], [[5.0, 5.0]]])
    result = losses.visual_loss(imagined, jnp.zeros((2, 1, 2)), jnp.array([True, False]))
    assert (float(result.total), int(result.count)) == (3.0, 2)
    assert float(result.mean()) == 1.5


def test_action_loss_leaves_out_steps_past_the_end():
    velocity = jnp.ones((1, 2, 3, 4)).at[0, :, 2].set(100.0)
    mask = jnp.array([[True, True, False]])
    result = losses.action_loss(velocity, jnp.zeros((1, 2, 3, 4)), mask)
    assert (float(result.total), int(result.count)) == (16.0, 16)


def test_nothing_counted_is_zero_not_nan():
    nothing = losses.token_loss(
        jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool)
    )
    assert float(nothing.mean()) == 0.0
