"""The training step: micro-batches, masks, what trains, averages, steps that do not count."""

import dataclasses
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lara_jax import lora
from lara_jax.batch import Batch
from lara_jax.checkpoint import CheckpointStore, RunInfo, load_average, load_params
from lara_jax.config import Recipe, load_recipe
from lara_jax.curriculum import Stage
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.optimizer import make_optimizer, trained_paths
from lara_jax.param_tree import flat, select
from lara_jax.sharding import make_mesh, replicated
from lara_jax.train_step import (
    TrainState,
    accumulate,
    acting_params,
    divisors_of,
    flow_draws,
    init_state,
    logical_axes,
    make_train_step,
    stage_loss,
    updated,
)
from tests.models import tiny

ALL = Stage(name="all", token_weight=1.0, visual_weight=0.2, action_weight=1.0)
ROWS = 4


def model() -> LaraVLA:
    config = tiny.config()
    return LaraVLA(
        dataclasses.replace(config, vision=dataclasses.replace(config.vision, patch_size=8))
    )


def recipe(**changes: object) -> Recipe:
    """The debug recipe with a moving average and 32 px frames: 4 x 4 patches, 2 x 2 tokens."""
    size = ["data.resize_px=32,32", "data.min_pixels=1024", f"data.batch_size={ROWS}"]
    size += ["ema.decay=0.9"]
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
        annotated=np.arange(ROWS) < 1,
        dataset=np.zeros(ROWS, np.int32),
        sample_id=np.arange(ROWS, dtype=np.int32),
    )


OPTIMIZER = optax.sgd(0.1)


@cache
def state() -> TrainState:
    made = jax.jit(lambda key: init_state(model(), OPTIMIZER, recipe(), key))
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
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), numbers, sums)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(pieces.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_metrics_are_the_weighted_sum():
    _, metrics = step()(state(), batch())
    parts = metrics.pop("by_dataset")
    losses = {"loss", "loss_token", "loss_visual", "loss_action"}
    assert set(metrics) == losses | {"gradient_norm", "skipped", "verdict"}
    for name, part in parts.items():  # one dataset, of which one row is annotated
        total, count = part[0].sum(axis=0)
        np.testing.assert_allclose(metrics[f"loss_{name}"], total / count, rtol=1e-6)
        assert 0 < part[0, 1, 1] < part[0, 0, 1]
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
    assert {name for name in metrics if name.startswith("loss_")} == {"loss_action"}
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


def test_the_average_follows_what_trains():
    one, _ = step()(state(), batch())
    two, _ = step()(one, batch())
    jax.tree.map(np.testing.assert_array_equal, state().ema, state().params)
    for before, after, params in zip(
        *(jax.tree.leaves(tree) for tree in (one.ema, two.ema, two.params)), strict=True
    ):
        np.testing.assert_allclose(after, 0.9 * before + 0.1 * params, atol=1e-7)
    acting = acting_params(two.params, two.ema, recipe())
    jax.tree.map(np.testing.assert_array_equal, acting, two.ema)


def test_a_bad_step_changes_nothing_but_the_counters():
    """Its batch has a number that is none; the step after it counts again."""
    before, _ = step()(state(), batch())
    bad = dataclasses.replace(batch(), actions=np.full_like(batch().actions, np.nan))
    after, metrics = step()(before, bad)
    for name in ("params", "opt_state", "teacher", "ema"):
        same = getattr(before, name), getattr(after, name)
        jax.tree.map(np.testing.assert_array_equal, *same)
    assert (int(after.step), int(after.spikes.skipped), int(after.spikes.in_a_row)) == (2, 1, 1)
    assert not np.isfinite(metrics["loss"]) and int(metrics["skipped"]) == 1
    assert not any(np.asarray(part).any() for part in metrics["by_dataset"].values())
    good, metrics = step()(after, batch())
    assert moved(after, good, "text") > 1e-6 and np.isfinite(metrics["loss"])
    assert (int(good.spikes.skipped), int(good.spikes.in_a_row)) == (1, 0)


def test_what_a_stage_does_not_train_has_no_gradient():
    """Neither a stage's frozen part nor a group frozen for good is differentiated."""
    seen: set[str] = set()

    def record(gradients, state, params=None):
        seen.update(flat(gradients))
        return gradients, state

    recorder = optax.GradientTransformation(lambda params: (), record)
    frozen = "({'name': 'early', 'patterns': ('vision/*', '*/attn/*'), 'freeze': True},)"
    settings = recipe(**{"optimizer.groups": frozen, "train.accumulate_steps": 2})
    start = jax.eval_shape(lambda: init_state(model(), recorder, settings, jax.random.key(0)))
    everything = set(flat(start.params))
    for trains, networks in (("backbone", ("text",)), ("action_only", ("action_expert",))):
        seen.clear()
        weight = {"token_weight": 1.0} if trains == "backbone" else {"action_weight": 1.0}
        stage = Stage(name=trains, trains=trains, **weight)
        jax.eval_shape(make_train_step(model(), recorder, stage, settings), start, batch())
        assert seen == {p for p in everything if p.startswith(networks) and "/attn/" not in p}
    assert set(flat(start.ema)) == {p for p in everything if "vision" not in p and "attn" not in p}


RANK = {"lora.rank": 2, "lora.patterns": "vision/*,text/*", "train.stages": "action"}


@cache
def lora_start() -> TrainState:
    """With factors that have learnt something: B is no longer zero."""
    settings = recipe(**RANK)
    made = jax.jit(lambda key: init_state(model(), make_optimizer(settings), settings, key))
    start = made(jax.random.key(0))
    factors = jax.tree.map(lambda x: x + 0.05, start.params["lora"])
    return dataclasses.replace(start, params=start.params | {"lora": factors})


def test_an_adapted_model_is_the_merged_one():
    """x W + scale (x A) B gives the losses of W + scale A B, in every dense layer."""
    settings = recipe(**RANK | {"lora.patterns": "*"})
    draws = flow_draws(jax.random.key(1), batch(), model().config.expert.noise_draws)
    divisors = divisors_of(batch(), model())

    @jax.jit
    def losses(params):
        args = batch(), draws, jax.random.key(2), divisors, model(), ALL, settings
        return stage_loss(params, lora_start().teacher, *args)[1]

    networks = {n: tree for n, tree in lora_start().params.items() if n != lora.LORA}
    key = jax.random.key(3)
    factors = lora.init_factors(networks, logical_axes(model()), settings.lora, key)
    adapted = networks | {lora.LORA: jax.tree.map(lambda x: x + 0.05, factors)}
    merged = lora.merged(adapted, settings.lora.scale)
    nothing = jax.tree.map(jnp.zeros_like, adapted["lora"])
    expected = losses(merged | {"lora": nothing})
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), losses(adapted), expected)
    without = losses(adapted | {"lora": nothing})
    assert abs(float(expected["loss"] - without["loss"])) > 1e-3


def test_only_factors_and_whole_networks_move_and_the_teacher_sees_them_merged():
    settings = recipe(**RANK)
    optimizer, start = make_optimizer(settings), lora_start()
    start = dataclasses.replace(start, step=jnp.int32(61))  # past the rate's first steps
    trained = select(start.params, trained_paths(settings, start.params, settings.stages))
    assert set(trained) == set(start.ema) == {"lora", "action_expert"}
    gradients = jax.tree.map(jnp.ones_like, trained)
    update = jax.jit(updated, static_argnums=(4, 5))
    after = update(start, trained, gradients, jnp.array(True), optimizer, settings)
    assert moved(start, after, "vision") == moved(start, after, "text") == 0
    assert moved(start, after, "lora") > 1e-4 and moved(start, after, "action_expert") > 1e-4
    vision = lora.merged(after.params, settings.lora.scale)["vision"]
    for before, teacher, student in zip(
        *(jax.tree.leaves(tree) for tree in (start.teacher, after.teacher, vision)), strict=True
    ):
        np.testing.assert_allclose(teacher, 0.999 * before + 0.001 * student, atol=1e-6)


def test_the_whole_state_comes_back(tmp_path: Path):
    """Factors, moments, average and counters; and what a policy acts with needs only the folder."""
    saved = dataclasses.replace(lora_start(), ema=jax.tree.map(lambda x: x + 1, lora_start().ema))
    store = CheckpointStore(tmp_path)
    store.save(1, saved, RunInfo(recipe=recipe(**RANK), statistics={}, tokenizer={}))
    where = replicated(make_mesh(devices=jax.devices()[:1]))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), saved)
    store.wait()
    restored = store.restore(abstract, 1)
    store.close()
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
    acting = acting_params(load_params(tmp_path), load_average(tmp_path), recipe(**RANK))
    assert acting.keys() == {"vision", "text", "action_expert"}
    expected = acting_params(saved.params, saved.ema, recipe(**RANK))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), acting, expected)
