"""Environments in processes: the same bits in any number of them, and a death is told."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mujoco")

from lara_jax.evals.rollout import Episode, Rollouts, rollout
from lara_jax.evals.suites import Suite, trials
from lara_jax.evals.tabletop.suite import TabletopSuite
from lara_jax.evals.workers import LaneConfig, Lanes
from tests.evals.counting import EXITS, IS_KILLED, REFUSES, Counting, Shortened, ones


def run(suite: Suite, episodes: int, policy: Any, *, lanes: int, workers: int, **options: Any):
    config = LaneConfig(suite=suite, watch="primary", views=("primary", "primary@-2"))
    with Lanes(config, lanes, workers=workers) as open_lanes:
        return rollout(
            policy,
            open_lanes,
            trials(suite, episodes),
            keep=lambda episode: True,
            execute_steps=4,
            **options,
        )


def seeing(observations: Any) -> np.ndarray:
    """Chunks that every pixel, also of two steps earlier, and the state have a say in."""
    chunks = []
    for o in observations:
        earlier = o["primary"] if o["primary@-2"] is None else o["primary@-2"]
        seen = o["primary"].astype(np.float64).mean((0, 1)) / 255 - 0.3 * earlier.mean() / 255
        noise = np.sin(1e3 * np.array([*seen, *o["state"][:4]]))
        chunks.append(noise * (0.05, 0.05, 0.05, 0, 0, 0.2, 1) * np.ones((4, 1)))
    return np.stack(chunks)


def test_any_number_of_processes_gives_the_same_episodes_bitwise() -> None:
    suite = TabletopSuite(families=("place", "two_stage"), image_size_px=16)

    def shortened(workers: int) -> Rollouts:
        return run(Shortened(suite), 3, seeing, lanes=4, workers=workers, film_episodes=1)

    alone, four = shortened(1), shortened(4)
    assert len(alone.episodes) == 6
    for one, other in zip(alone.episodes, four.episodes, strict=True):
        assert (one.trial, one.instruction, one.success, one.steps, one.phase) == (
            other.trial,
            other.instruction,
            other.success,
            other.steps,
            other.phase,
        )
        for name in ("seen", "frames"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        states = [[seen["state"] for _, seen in e.asked] for e in (one, other)]
        np.testing.assert_array_equal(*states)
    moved = np.abs(np.diff([seen["state"] for _, seen in alone.episodes[0].asked], axis=0))
    assert moved.max() > 0.01
    assert len(alone.episodes[0].frames) == alone.episodes[0].steps + 1


def test_what_a_worker_imports_for_the_tabletop_has_no_device_code() -> None:
    code = (
        "import sys, lara_jax.evals.workers, lara_jax.evals.tabletop.suite\n"
        "assert not {'jax', 'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_workers_are_other_processes_without_jax() -> None:
    result = run(Counting((3, 3, 3)), 3, ones, lanes=3, workers=2)
    first = [episode.asked[0][1] for episode in result.episodes]
    assert not any(seen["jax"] for seen in first)
    processes = [seen["process"] for seen in first]
    assert processes[0] == processes[2] != processes[1]
    assert os.getpid() not in processes


@pytest.mark.parametrize(("goal", "how"), [(EXITS, "exit code 3"), (IS_KILLED, "signal 9")])
def test_a_worker_that_dies_is_named_and_finished_episodes_are_told(goal: int, how: str) -> None:
    finished: list[Episode] = []
    with pytest.raises(
        ChildProcessError, match=rf"worker 1 of 2 died \(.*{how}\) with count episode 2 under way"
    ):
        run(Counting((20, 2, goal)), 3, ones, lanes=2, workers=2, on_episode=finished.append)
    assert [(episode.trial.index, episode.success) for episode in finished] == [(1, True)]


def test_what_an_environment_refuses_is_told_across_processes() -> None:
    with pytest.raises(ValueError, match="count episode 1, step 0: no counting on Sundays"):
        run(Counting((20, REFUSES)), 2, ones, lanes=2, workers=2)


@pytest.mark.parametrize(("lanes", "workers"), [(0, 1), (1, 0)])
def test_there_is_an_environment_and_a_process(lanes: int, workers: int) -> None:
    with pytest.raises(ValueError, match=f"got {lanes} and {workers}"):
        Lanes(LaneConfig(suite=Counting((1,))), lanes, workers=workers)
