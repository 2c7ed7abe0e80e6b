"""The closed loop: a perfect policy succeeds, an idle one fails, and the numbers are right."""

import importlib
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mujoco")

from lara_jax.evals.rollout import main, rollout, wilson_interval
from lara_jax.evals.tabletop import TabletopConfig, TabletopEnv, episode_seed, expert_step

SEEDS = [episode_seed(0, "eval", index) for index in range(5)]
KEYS = {
    "suite",
    "task",
    "episodes",
    "successes",
    "success_rate",
    "ci_low",
    "ci_high",
    "latent_slots",
    "latency_ms_p50",
}


def expert_policy(envs: Sequence[TabletopEnv]) -> Any:
    """The scripted expert behind the interface of a policy: it peeks into the environments."""

    def policy(observations: Sequence[Any]) -> np.ndarray:
        assert len(observations) == len(envs)
        return np.stack([expert_step(env).action[None] for env in envs])

    return policy


def idle_policy(observations: Sequence[Any]) -> np.ndarray:
    return np.zeros((len(observations), 8, 7), np.float32)


class Counter(gymnasium.Env):
    """Solved once its actions sum up to its seed; the observation tells the sum."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.goal, self.total = seed, 0.0
        return {"instruction": f"count to {seed}", "total": 0.0}, {}

    def step(self, action: np.ndarray) -> Any:
        self.total += float(action[0])
        observation = {"instruction": f"count to {self.goal}", "total": self.total}
        return observation, 0.0, self.total == self.goal, self.total > 20, {}

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), int(self.total), np.uint8)


def ones(observations: Sequence[Any]) -> np.ndarray:
    return np.ones((len(observations), 4, 1), np.float32)


def test_frames_of_earlier_steps_are_views_of_their_own() -> None:
    """None before the episode, then what was seen so many steps ago, also within a chunk."""
    seen: list[tuple[float, float | None]] = []

    def policy(observations: Sequence[Any]) -> np.ndarray:
        seen.extend((o["total"], o["total@-3"]) for o in observations)
        return np.ones((len(observations), 2, 7), np.float32)

    rollout(policy, [Counter()], [8], execute_steps=2, views=("total", "total@-3"))
    assert seen == [(0.0, None), (2.0, None), (4.0, 1.0), (6.0, 3.0)]


@pytest.mark.parametrize("parallel", [1, 2])
def test_the_expert_succeeds_through_the_policys_interface(parallel: int) -> None:
    envs = [TabletopEnv() for _ in range(parallel)]
    seeds = SEEDS if parallel == 2 else SEEDS[:2]
    result = rollout(expert_policy(envs), envs, seeds, execute_steps=1)
    assert [episode.seed for episode in result.episodes] == seeds
    assert result.successes == len(seeds) and result.success_rate == 1
    assert all(10 <= episode.steps <= 35 for episode in result.episodes)


def test_an_idle_policy_fails_and_runs_out_of_steps() -> None:
    envs = [TabletopEnv(TabletopConfig(max_steps=10)) for _ in range(2)]
    result = rollout(idle_policy, envs, SEEDS[:3], execute_steps=4)
    assert result.successes == 0
    assert [episode.steps for episode in result.episodes] == [10] * 3
    assert len(result.call_seconds) == 2 * 3  # two rounds of ceil(10 / 4) calls
    assert result.interval[0] == 0 and 0 < result.interval[1] < 1


def test_stops_at_success_and_asks_again_after_the_executed_steps() -> None:
    seen: list[list[float]] = []

    def policy(observations: Sequence[Any]) -> np.ndarray:
        seen.append([observation["total"] for observation in observations])
        return ones(observations)

    result = rollout(policy, [Counter(), Counter()], [5, 2, 30], execute_steps=3, record_episodes=1)
    assert [episode.success for episode in result.episodes] == [True, True, False]
    assert [episode.steps for episode in result.episodes] == [5, 2, 21]
    # The second is done after 2 steps and waits; the last round has one episode, yet two rows.
    assert seen[:3] == [[0, 0], [3, 2], [0, 0]]
    assert seen[3:] == [[3 * turn, 3 * turn] for turn in range(1, 7)]
    assert [int(frame[0, 0, 0]) for frame in result.episodes[0].frames] == [0, 1, 2, 3, 4, 5]
    assert result.episodes[1].frames == ()
    assert result.episodes[1].instruction == "count to 2"


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # R: binom::binom.wilson
        (0, 20, 0.0, 0.1611252),
        (10, 20, 0.2992980, 0.7007020),
        (20, 20, 0.8388748, 1.0),
        (50, 50, 0.9286524, 1.0),
        (1, 4, 0.0455873, 0.6993582),
    ],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    np.testing.assert_allclose(wilson_interval(successes, trials), (low, high), atol=1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_counts_raise(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


@pytest.mark.parametrize(
    ("policy", "envs", "seeds", "execute_steps", "message"),
    [
        (ones, 1, [1], 5, "execute 5 actions"),
        (ones, 1, [1], 0, "at least one"),
        (ones, 1, [], 1, "at least one"),
        (ones, 0, [1], 1, "at least one"),
        (lambda observations: np.zeros((1, 7)), 1, [1], 1, r"\[1, C, A\]"),
        (lambda observations: np.zeros((1, 4, 7)), 2, [1, 2], 1, r"\[2, C, A\]"),
    ],
)
def test_wrong_use_raises(
    policy: Any, envs: int, seeds: list[int], execute_steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rollout(policy, [Counter() for _ in range(envs)], seeds, execute_steps=execute_steps)


@pytest.fixture
def idle_workdir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory whose policy stays where it is."""

    class Policy:
        latent_slots = 3
        views = ("primary",)

        @classmethod
        def from_workdir(
            cls, workdir: Path, *, latent_slots: int | None, dataset: str | None
        ) -> "Policy":
            assert workdir == tmp_path and dataset is None
            policy = cls()
            policy.latent_slots = 3 if latent_slots is None else latent_slots
            return policy

        def __call__(self, observations: Sequence[Any]) -> np.ndarray:
            return idle_policy(observations)

    module = types.ModuleType("lara_jax.inference.policy")
    module.Policy = Policy  # type: ignore[attr-defined]
    importlib.import_module("lara_jax.inference")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return tmp_path


def test_main_prints_one_json_object_and_saves_a_gif(
    idle_workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gif = idle_workdir / "rollout.gif"
    arguments = ["--workdir", str(idle_workdir), "--suite", "tabletop", "--episodes", "3"]
    options = ["--latent-slots", "1", "--gif", str(gif), "--gif-episodes", "1", "--parallel", "2"]
    options += ["--image-size", "16"]
    assert main([*arguments, *options, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert set(result) >= KEYS
    assert result["suite"] == "tabletop" and result["task"] == "place"
    assert result["episodes"] == 3 and result["successes"] == 0 and result["success_rate"] == 0
    assert result["latent_slots"] == 1 and result["latency_ms_p50"] > 0
    with Image.open(gif) as animation:
        assert animation.size == (256, 296)  # one episode, though three were run


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--suite", "kitchen", "unknown suite 'kitchen', available: tabletop"),
        ("--episodes", "0", "at least 1"),
    ],
)
def test_main_refuses(option: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["--workdir", "nowhere", option, value])
