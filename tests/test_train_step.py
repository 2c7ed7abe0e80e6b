"""The training step: micro-batches, masks, what trains, the teacher's pace."""

import dataclasses
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lara_jax.batch import Batch
from lara_jax.config import Recipe, load_recipe
from lara_jax.curriculum import Stage
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.train_step import TrainState, accumulate, init_state, make_train_step
from tests.models import tiny

ALL = Stage(name="all", token_weight=1.0, visual_weight=0.2, action_weight=1.0)
ROWS = 4


def model() -> LaraVLA:
    config = tiny.config()
    return LaraVLA(
        dataclasses.replace(config, vision=dataclasses.replace(config.vision, patch_size=8))
    )


def recipe(**changes: object) -> Recipe:
    """The debug recipe with 32 px frames: 4 x 4 patches, 2 x 2 image tokens."""
    size = ["data.resize_px=32,32", "data.min_pixels=1024", f"data.batch_size={ROWS}"]
    overrides = size + [f"{name}={value}" for name, value in changes.items()]
    return load_recipe(Path(__file__).parents[1] / "configs/debug.py", overrides)


def batch() -> Batch:
    """Rows that differ in every mask."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(10, tiny.VOCAB, (ROWS, 8))
    prefix[:, 2:6] = tiny.IMAGE
    suffix = rng.integers(10, tiny.VOCAB, (ROWS, 7))
    suffix[:, 1:5] = tiny.IMG_NEXT
    mask = np.ones((ROWS, 7), bool)
    mask[1, 6] = mask[3, 5:] = False
    frames = rng.integers(0, 256, (2, ROWS, 1, 32, 32, 3), dtype=np.uint8)
    action_mask = np.ones((ROWS, 4, 3), bool)
    action_mask[0, 1:] = False
    return Batch(
        images=frames[0],
        view_mask=np.ones((ROWS, 1), bool),
        next_images=frames[1],
        next_mask=np.array([[True], [False], [True], [True]]),
        state=rng.normal(size=(ROWS, 5)).astype(np.float32),
        actions=rng.normal(size=(ROWS, 4, 3)).astype(np.float32),
        action_mask=action_mask,
        prefix_ids=prefix.astype(np.int32),
        prefix_mask=np.ones((ROWS, 8), bool),
        suffix_ids=suffix.astype(np.int32),
        suffix_mask=mask,
        loss_mask=mask & (suffix != tiny.IMG_NEXT),
        dataset=np.zeros(ROWS, np.int32),
        sample_id=np.arange(ROWS, dtype=np.int32),
    )


OPTIMIZER = optax.sgd(0.1)


@cache
def state() -> TrainState:
    made = jax.jit(lambda key: init_state(model(), OPTIMIZER, key, teacher=True))
    return made(jax.random.key(0))


@cache
def step(stage: Stage = ALL, accumulate_steps: int = 1):
    settings = recipe(**{"train.accumulate_steps": accumulate_steps})
    return jax.jit(make_train_step(model(), OPTIMIZER, stage, settings))


def moved(before: TrainState, after: TrainState, part: str) -> float:
    pairs = zip(
        jax.tree.leaves(before.params[part]), jax.tree.leaves(after.params[part]), strict=True
    )
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def test_micro_batches_add_up_to_the_batch():
    """Also where masks differ from row to row, so that the pieces weigh differently."""
    (whole, numbers), (pieces, sums) = (step(ALL, n)(state(), batch()) for n in (1, 2))
    for name in numbers:
        np.testing.assert_allclose(numbers[name], sums[name], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(pieces.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_metrics_are_the_weighted_sum():
    _, metrics = step()(state(), batch())
    assert set(metrics) == {"loss", "loss_token", "loss_visual", "loss_action", "gradient_norm"}
    total = metrics["loss_token"] + 0.2 * metrics["loss_visual"] + metrics["loss_action"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    # Untrained: the tokens are about uniform, the velocity about zero against v = a - e.
    np.testing.assert_allclose(metrics["loss_token"], np.log(tiny.VOCAB), rtol=0.2)
    assert 1 < metrics["loss_action"] < 4


@pytest.mark.parametrize(
    ("field", "place", "loss"),
    [
        ("next_images", (1,), "loss_visual"),
        ("suffix_ids", (3, slice(5, None)), "loss_token"),
    ],
)
def test_masked_values_do_not_count(field, place, loss):
    """A next frame or a token that a mask marks changes its loss nowhere.

    (An action past the episode's end does: its noisy version is an input beside the others.)
    """
    before = batch()
    value = getattr(before, field).copy()
    value[place] = 3
    _, was = step()(state(), before)
    _, now = step()(state(), dataclasses.replace(before, **{field: value}))
    np.testing.assert_array_equal(was[loss], now[loss])
    value[:, ..., 0] = 7  # anywhere else it does
    _, other = step()(state(), dataclasses.replace(before, **{field: value}))
    assert abs(float(other[loss] - was[loss])) > 1e-4


def test_every_part_trains_in_a_full_stage_and_the_run_is_reproducible():
    first, again = (step()(state(), batch())[0] for _ in range(2))
    assert all(moved(state(), first, part) > 1e-6 for part in ("vision", "text", "action_expert"))
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_differs_from_step_to_step():
    now = dataclasses.replace(state(), step=state().step + 1)
    losses = [float(step()(s, batch())[1]["loss_action"]) for s in (state(), now)]
    assert losses[0] != losses[1]


def test_action_only_leaves_the_backbone_alone():
    stage = Stage(name="act", action_weight=1.0, trains="action_only")
    after, metrics = step(stage)(state(), batch())
    assert set(metrics) == {"loss", "loss_action", "gradient_norm"}
    assert moved(state(), after, "vision") == moved(state(), after, "text") == 0
    assert moved(state(), after, "action_expert") > 1e-6


def test_teacher_moves_every_second_step_by_the_momentum():
    one, _ = step()(state(), batch())
    two, _ = step()(one, batch())
    for start, unmoved, after, student in zip(
        *(jax.tree.leaves(t) for t in (state().teacher, one.teacher, two.teacher)),
        jax.tree.leaves(two.params["vision"]),
        strict=True,
    ):
        np.testing.assert_array_equal(start, unmoved)
        np.testing.assert_allclose(after, 0.999 * start + 0.001 * student, atol=1e-7)


def test_accumulate_takes_strided_pieces():
    rows = jnp.arange(6.0)
    seen = accumulate(lambda x, i: {"sum": x.sum(), "weighted": x[0] * i}, (rows,), 3)
    assert float(seen["sum"]) == 15 and float(seen["weighted"]) == 0 * 0 + 1 * 1 + 2 * 2
