"""The optimizer against PyTorch's AdamW and the reference's schedule, and what each stage moves."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lara_jax.config import Recipe, load_recipe
from lara_jax.curriculum import Stage
from lara_jax.optimizer import learning_rates, make_optimizer, part_labels, warmup_cosine


def tiny_params() -> dict:
    rng = np.random.default_rng(0)
    return {
        "vision": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)},
        "text": {"norm": {"scale": jnp.ones((4,))}},
        "action_expert": {"bias": jnp.asarray(rng.normal(size=(5,)), jnp.float32)},
    }


def gradients(step: int) -> dict:
    rng = np.random.default_rng(step + 1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tiny_params())


def recipe(repository: Path, *stages: Stage, steps: int) -> Recipe:
    """The published optimizer with stages of one's choice."""
    base = load_recipe(repository / "configs" / "bridge_4b.py")
    train = dataclasses.replace(base.train, steps=steps)
    return dataclasses.replace(base, stages=stages, train=train)


FULL = Stage(name="full", action_weight=1.0)
BACKBONE = Stage(name="backbone", token_weight=1.0, trains="backbone")
ACTION = Stage(name="action", action_weight=1.0, trains="action_only")


@pytest.mark.torch
@pytest.mark.parametrize("steps", [7, 100])
def test_schedule_is_the_references(repository: Path, steps: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peaks = {"backbone": 1e-5, "expert": 1e-4}
    groups = [{"params": [torch.zeros(1)], "lr": peak} for peak in peaks.values()]
    theirs = transformers.get_scheduler(
        "cosine_with_min_lr",
        torch.optim.AdamW(groups, lr=3e-5),
        num_warmup_steps=-(-steps // 10),
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr": 5e-7},
    )
    config = recipe(repository, FULL, steps=steps)
    ours = learning_rates(config.optimizer, config.stages, steps)
    for step in range(steps):
        for part, rate in zip(peaks, theirs.get_last_lr(), strict=True):
            np.testing.assert_allclose(ours[part](step), rate, rtol=1e-5, err_msg=f"{part} {step}")
        theirs.optimizer.step()
        theirs.step()


@pytest.mark.torch
def test_updates_are_those_of_torch(repository: Path) -> None:
    """AdamW, clipping and per-part rates together, over a whole small run."""
    torch = pytest.importorskip("torch")
    steps = 12
    config = recipe(repository, FULL, steps=steps)
    ours = make_optimizer(config)
    params = tiny_params()
    state = ours.init(params)
    rates = learning_rates(config.optimizer, config.stages, steps)
    theirs = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in jax.tree.leaves(params)]
    parts = jax.tree.leaves(part_labels(params))
    adamw = torch.optim.AdamW(
        [{"params": [p]} for p in theirs], betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-8
    )
    for step in range(steps):
        grads = gradients(step)
        updates, state = ours.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for group, p, g, part in zip(
            adamw.param_groups, theirs, jax.tree.leaves(grads), parts, strict=True
        ):
            group["lr"] = float(rates[part](step))
            p.grad = torch.tensor(np.array(g))
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adamw.step()
    for mine, p in zip(jax.tree.leaves(params), theirs, strict=True):
        np.testing.assert_allclose(mine, p.detach().numpy(), rtol=1e-5, atol=1e-7)


def moved(config: Recipe, steps: range) -> set[str]:
    """Top-level names whose parameters change over some steps of a run."""
    optimizer = make_optimizer(config)
    params, state = tiny_params(), optimizer.init(tiny_params())
    before = params
    for step in range(steps.stop):
        if step == steps.start:
            before = params
        updates, state = optimizer.update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, params)
    return {name for name, tree in changed.items() if any(jax.tree.leaves(tree))}


def test_each_stage_moves_what_it_trains(repository: Path) -> None:
    config = recipe(repository, BACKBONE, ACTION, FULL, steps=12)
    assert moved(config, range(0, 4)) == {"vision", "text"}
    assert moved(config, range(4, 8)) == {"action_expert"}
    assert moved(config, range(8, 12)) == {"vision", "text", "action_expert"}


def test_gradients_of_frozen_parts_do_not_count_in_the_norm(repository: Path) -> None:
    """However large the frozen backbone's gradient, the expert's update stays the same."""
    config = recipe(repository, ACTION, steps=10)
    optimizer = make_optimizer(config)
    params = tiny_params()
    results = []
    for scale in (1.0, 1e6):
        state = optimizer.init(params)
        for step in range(3):
            grads = gradients(step)
            grads["vision"] = jax.tree.map(lambda g, s=scale: g * s, grads["vision"])
            updates, state = optimizer.update(grads, state, params)
        results.append(updates["action_expert"]["bias"])
    np.testing.assert_array_equal(*results)


def test_each_stage_has_its_own_schedule(repository: Path) -> None:
    config = recipe(repository, BACKBONE, FULL, steps=200)
    rates = learning_rates(config.optimizer, config.stages, 200)
    backbone = [float(rates["backbone"](step)) for step in range(200)]
    expert = [float(rates["expert"](step)) for step in range(200)]
    assert backbone[0] == backbone[100] == 0.0
    assert np.argmax(backbone[:100]) == 10 and np.argmax(backbone[100:]) == 10
    np.testing.assert_allclose([backbone[10], backbone[110], expert[110]], [1e-5, 1e-5, 1e-4], 1e-6)
    assert not any(expert[:100])


def test_every_parameter_has_a_part_or_raises() -> None:
    labels = part_labels(tiny_params())
    assert jax.tree.leaves(labels) == ["expert", "backbone", "backbone"]
    with pytest.raises(ValueError, match=r"\['projector'\]"):
        part_labels({**tiny_params(), "projector": {"w": jnp.ones(2)}})


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    curve = warmup_cosine(10, 0.0, 0.1)
    assert float(curve(0)) == 1.0
    np.testing.assert_allclose(curve(10), 0.1, rtol=1e-6)
