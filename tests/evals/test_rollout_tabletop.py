"""The tabletop as a suite: which episodes, and the furthest phase of each."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("mujoco")

from lara_jax.evals.tabletop import TabletopConfig, TabletopEnv, episode_seed, expert_step
from lara_jax.evals.tabletop.suite import PHASES, TabletopSuite, WithPhase
from lara_jax.evals.tabletop.tasks import Goal, Move


def phases(env: WithPhase, *, steps: int = 130, fetch: Move | None = None) -> list[str]:
    """The phases of an episode of the expert; with `fetch`, it does another move than is asked."""
    tabletop = env.tabletop
    asked = tabletop.task
    told = asked
    if fetch is not None:
        told = dataclasses.replace(asked, goal=Goal(moves=(fetch,), words={}))
    found = []
    for _ in range(steps):
        tabletop._task = told
        action = expert_step(tabletop).action
        tabletop._task = asked
        _, _, solved, truncated, info = env.step(action)
        found.append(info["phase"])
        if solved or truncated:
            break
    return list(dict.fromkeys(found))


def started(family: str) -> WithPhase:
    suite = TabletopSuite(families=(family,), image_size_px=16)
    env = suite.make_env(family)
    _, info = env.reset(seed=suite.trial(family, 0).seed)
    assert info["phase"].endswith("not reached")
    return env


def test_the_expert_goes_through_all_phases() -> None:
    assert phases(started("place")) == list(PHASES[2:])


def test_tasks_of_two_moves_say_which_of_them() -> None:
    found = phases(started("order"))
    one, two = ([f"move {n}: {phase}" for phase in (PHASES[0], *PHASES[2:-1])] for n in (1, 2))
    assert found == [*one[1:], *two, "solved"]


def test_another_block_in_the_gripper_is_told() -> None:
    env = started("place")
    (move,) = env.tabletop.moves
    other = next(block for block in env.tabletop.block_names if block != move.block)
    found = phases(env, fetch=dataclasses.replace(move, block=other))
    assert found[-1] == "lifted another block"
    assert found[0] == "not reached"


def test_a_phase_that_is_lost_again_stays() -> None:
    env = started("place")
    for _ in range(8):
        env.step(expert_step(env.tabletop).action)
    _, _, _, _, info = env.step(np.array([0, 0, 0.05, 0, 0, 0, 1], np.float32))
    before = info["phase"]
    for _ in range(6):
        _, _, _, _, info = env.step(np.array([-0.05, -0.05, 0.05, 0, 0, 0, 1], np.float32))
    assert info["phase"] == before != "not reached"
    env.reset(seed=1)
    _, info = env.reset(seed=2)
    assert info["phase"] == "not reached"


def test_its_episodes_are_those_of_the_split() -> None:
    suite = TabletopSuite(families=("place", "stack"), split="eval_colours", seed=3)
    seeds = [suite.trial(task, index).seed for task in suite.tasks for index in range(2)]
    own = [episode_seed(3, "eval_colours", index) for index in range(2)]
    assert seeds == own * 2
    # As the tabletop by itself, with nothing but the seed.
    seen, _ = suite.make_env("place").reset(seed=own[0])
    alone, _ = TabletopEnv(TabletopConfig(split="eval_colours")).reset(seed=own[0])
    assert seen["instruction"] == alone["instruction"]
    np.testing.assert_array_equal(seen["primary"], alone["primary"])
