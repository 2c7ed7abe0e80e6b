"""The optimizer against PyTorch's AdamW and the reference's schedule; stages, groups, moments."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lara_jax.config import Recipe, load_recipe, recipe_from_dict, recipe_to_dict
from lara_jax.curriculum import Stage, spans
from lara_jax.optimizer import (
    learning_rates,
    make_optimizer,
    part_of,
    trained_paths,
    warmup_cosine,
)
from lara_jax.optimizer_config import OptimizerConfig, ParameterGroup
from lara_jax.param_tree import flat, overlay, select


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


def recipe(repository: Path, *stages: Stage, steps: int, **optimizer: object) -> Recipe:
    """The published optimizer with stages of one's choice."""
    base = load_recipe(repository / "configs" / "bridge_4b.py")
    train = dataclasses.replace(base.train, steps=steps)
    changed = dataclasses.replace(base.optimizer, **optimizer)
    return dataclasses.replace(base, stages=stages, train=train, optimizer=changed)


def run(config: Recipe, steps: range, scale: float = 1.0) -> list[dict]:
    """The parameters before each of these steps and after the last, of a run from its beginning."""
    optimizer = make_optimizer(config)
    params = tiny_params()
    state = optimizer.init(params)
    stage_of = {
        n: s
        for s, start, end in spans(config.stages, config.train.steps)
        for n in range(start, end)
    }
    seen = []
    for n in range(steps.stop):
        seen.append(params)
        trained = trained_paths(config, params, [stage_of[n]])
        grads = select(jax.tree.map(lambda g: g * scale, gradients(n)), trained)
        updates, state = optimizer.update(grads, state, params, step=jnp.int32(n))
        params = overlay(params, optax.apply_updates(select(params, trained), updates))
    return [*seen[steps.start :], params]


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
    parts = [part_of(path) for path in sorted(flat(params))]
    adamw = torch.optim.AdamW(
        [{"params": [p]} for p in theirs], betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-8
    )
    for step in range(steps):
        grads = gradients(step)
        updates, state = ours.update(grads, state, params, step=jnp.int32(step))
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
    """Paths of the parameters that change over some steps of a run."""
    before, *_, after = (flat(params) for params in run(config, steps))
    return {path for path in before if (before[path] != after[path]).any()}


VISION, TEXT, EXPERT = "vision/kernel", "text/norm/scale", "action_expert/bias"


def test_each_stage_moves_what_it_trains(repository: Path) -> None:
    config = recipe(repository, BACKBONE, ACTION, FULL, steps=12)
    assert moved(config, range(0, 4)) == {VISION, TEXT}
    assert moved(config, range(4, 8)) == {EXPERT}
    assert moved(config, range(8, 12)) == {VISION, TEXT, EXPERT}


def test_a_stage_leaves_the_moments_of_what_it_does_not_train(repository: Path) -> None:
    config = recipe(repository, BACKBONE, ACTION, steps=12)
    optimizer = make_optimizer(config)
    before = optimizer.init(tiny_params())
    grads = select(gradients(0), {EXPERT})
    updates, after = optimizer.update(grads, before, tiny_params(), step=jnp.int32(7))
    assert flat(updates).keys() == {EXPERT}
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert before["backbone"] is after["backbone"]
    assert int(after["expert"].count) == 1


def test_what_no_stage_trains_has_no_moments(repository: Path) -> None:
    frozen = ParameterGroup(name="tower", patterns=("vision/*",), freeze=True)
    config = recipe(repository, BACKBONE, steps=12, groups=(frozen,))
    state = make_optimizer(config).init(tiny_params())
    assert list(state) == ["backbone"]
    assert set(flat(state["backbone"].mu)) == {TEXT}
    assert moved(config, range(0, 12)) == {TEXT}


def test_rates_follow_the_runs_step(repository: Path) -> None:
    """Not the optimizer's own count, which stands still in a skipped step."""
    config = recipe(repository, FULL, steps=100, weight_decay=0.0)
    optimizer = make_optimizer(config)
    params = tiny_params()
    moves = []
    for step in (5, 10):
        updates, _ = optimizer.update(
            gradients(0), optimizer.init(params), params, step=jnp.int32(step)
        )
        moves.append(updates["action_expert"]["bias"])
    np.testing.assert_allclose(moves[1], 2 * moves[0], rtol=1e-6)


def test_groups_scale_rate_and_decay(repository: Path) -> None:
    """The first group that matches counts."""
    groups = (
        ParameterGroup(name="norms", patterns=("*/norm/*",), rate_factor=0.5, decay_factor=0.0),
        ParameterGroup(name="text", patterns=("text/*",), rate_factor=100.0),
    )
    decay = 0.5
    plain, grouped = (
        recipe(repository, FULL, steps=12, groups=g, weight_decay=decay) for g in ((), groups)
    )
    optimizers = [make_optimizer(config) for config in (plain, grouped)]
    params, step = tiny_params(), jnp.int32(3)
    one, other = (
        flat(o.update(gradients(0), o.init(params), params, step=step)[0]) for o in optimizers
    )
    for path in (VISION, EXPERT):
        np.testing.assert_array_equal(one[path], other[path])
    rate = learning_rates(plain.optimizer, plain.stages, 12)["backbone"](3)
    undecayed = one[TEXT] + rate * decay * flat(params)[TEXT]
    np.testing.assert_allclose(other[TEXT], 0.5 * undecayed, rtol=1e-5)


def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near(repository: Path) -> None:
    wrong = ParameterGroup(name="norms", patterns=("text/norm/skale",), freeze=True)
    config = recipe(repository, FULL, steps=12, groups=(wrong,))
    with pytest.raises(ValueError, match=r"'norms': .*'text/norm/skale'.*near it: text/norm/scale"):
        make_optimizer(config).init(tiny_params())


def test_a_stage_that_trains_nothing_is_refused(repository: Path) -> None:
    frozen = ParameterGroup(name="expert", patterns=("action_expert/*",), freeze=True)
    config = recipe(repository, FULL, ACTION, steps=12, groups=(frozen,))
    with pytest.raises(ValueError, match="stage 'action' trains 'action_only', but"):
        make_optimizer(config).init(tiny_params())


def test_groups_are_data_in_a_recipe(repository: Path) -> None:
    """Written as plain values, also on the command line, and back from a checkpoint's JSON."""
    groups = "({'name': 'tower', 'patterns': ('vision/*',), 'freeze': True},)"
    config = load_recipe(repository / "configs/debug.py", [f"optimizer.groups={groups}"])
    tower = ParameterGroup(name="tower", patterns=("vision/*",), freeze=True)
    assert config.optimizer.groups == (tower,)
    assert recipe_from_dict(recipe_to_dict(config)) == config
    with pytest.raises(ValueError, match=r"groups\.frozen; did you mean .*\.freeze"):
        load_recipe(repository / "configs/debug.py", ["optimizer.groups=({'frozen': True},)"])


@pytest.mark.parametrize(
    ("moments", "bytes_per_number"), [("bfloat16_first", 6), ("bfloat16", 4), ("float32", 8)]
)
def test_moments_in_fewer_bits_move_parameters_alike(
    repository: Path, moments: str, bytes_per_number: int
) -> None:
    configs = [
        recipe(repository, FULL, steps=12, moments=m, expert_rate=1e-2)
        for m in ("float32", moments)
    ]
    exact, coarse = (run(config, range(0, 12)) for config in configs)
    state = make_optimizer(configs[1]).init(tiny_params())
    numbers = sum(x.size for x in jax.tree.leaves(tiny_params()))
    size = sum(x.nbytes for part in state.values() for x in jax.tree.leaves((part.mu, part.nu)))
    assert size == bytes_per_number * numbers
    for start, a, b in zip(*map(jax.tree.leaves, (exact[0], exact[-1], coarse[-1])), strict=True):
        np.testing.assert_allclose(b - start, a - start, atol=0.02 * np.abs(a - start).max())


def test_a_second_moment_that_could_not_fall_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'bfloat16' needs b2 <= 0\.98, got 0\.999"):
        OptimizerConfig(moments="bfloat16", b2=0.999)


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
    assert [part_of(path) for path in (VISION, TEXT, EXPERT)] == ["backbone", "backbone", "expert"]
    assert part_of("lora/text/layers/kernel/a") == "backbone"
    with pytest.raises(ValueError, match="'projector'"):
        part_of("projector/w")


def test_schedule_without_warmup_starts_at_the_peak() -> None:
    curve = warmup_cosine(10, 0.0, 0.1)
    assert float(curve(0)) == 1.0
    np.testing.assert_allclose(curve(10), 0.1, rtol=1e-6)
