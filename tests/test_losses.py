"""The three losses by hand-counted examples."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from lara_jax import batch, losses


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


def test_action_loss_leaves_out_steps_past_the_end_and_dimensions_of_other_robots():
    velocity = jnp.ones((1, 2, 3, 4)).at[0, :, 2].set(100.0).at[..., 3].set(50.0)
    mask = jnp.array([[True, True, False]])[..., None] & (jnp.arange(4) < 3)
    result = losses.action_loss(velocity, jnp.zeros((1, 2, 3, 4)), mask)
    assert (float(result.total), int(result.count)) == (12.0, 12)


def test_nothing_counted_is_zero_not_nan():
    nothing = losses.token_loss(
        jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), bool)
    )
    assert float(nothing.mean()) == 0.0


def test_divisors_of_a_batch_are_what_its_losses_count():
    """The train step divides by numbers counted beforehand; they must be the losses' own."""
    rng = np.random.default_rng(0)
    rows, suffix, chunk, draws, actions, block, width = 3, 5, 4, 2, 7, 4, 6
    shapes = ((rows, suffix), (rows, chunk, actions))
    masks = [jnp.asarray(rng.random(shape) < 0.6) for shape in shapes]
    next_mask = jnp.asarray([[True, False], [False, True], [True, True]])
    spec = batch.spec(
        batch_size=rows, views=2, image_size=(8, 8), state_dim=8, action_horizon=chunk,
        action_dim=actions, prefix_tokens=3, suffix_tokens=suffix,
    )  # fmt: skip
    whole = dataclasses.replace(spec, loss_mask=masks[0], action_mask=masks[1], next_mask=next_mask)
    found = losses.counts(whole, visual_numbers=block * width, noise_draws=draws)
    velocity, frame = jnp.zeros((rows, draws, chunk, actions)), jnp.zeros((rows, block, width))
    logits, ids = jnp.zeros((rows, suffix, 9)), jnp.zeros((rows, suffix), int)
    counted = {
        "token": losses.token_loss(logits, ids, masks[0]),
        "visual": losses.visual_loss(frame, frame, next_mask[:, 0]),
        "action": losses.action_loss(velocity, velocity, masks[1]),
    }
    assert {name: int(x) for name, x in found.items()} == {
        name: int(x.count) for name, x in counted.items()
    }


def test_losses_of_datasets_and_kinds_add_up_to_the_whole():
    sums = losses.Sum(jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([1, 0, 3, 1]))
    rows = SimpleNamespace(
        dataset=jnp.array([2, 0, 2, 2]), annotated=jnp.array([True, False, False, True])
    )
    parts = losses.by_dataset(sums, rows, 3)
    assert parts.shape == (3, 2, 2)
    np.testing.assert_array_equal(parts[0], [[2, 0], [0, 0]])
    np.testing.assert_array_equal(parts[1], 0)
    np.testing.assert_array_equal(parts[2], [[4, 3], [9, 2]])
    np.testing.assert_array_equal(parts.sum(axis=(0, 1)), [sums.total, sums.count])
    bad = dataclasses.replace(sums, totals=sums.totals.at[0].set(jnp.nan))
    np.testing.assert_array_equal(losses.by_dataset(bad, rows, 3)[0], parts[0])
