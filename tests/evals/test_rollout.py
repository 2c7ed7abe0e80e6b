"""The closed loop: a perfect policy succeeds, an idle one fails, and the numbers are right."""

from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("mujoco")

from lara_jax.evals.rollout import Episode, FirstOfEach, Rollouts, rollout, wilson_interval
from lara_jax.evals.suites import Trial, trials
from lara_jax.evals.tabletop import TabletopConfig, TabletopEnv, episode_seed, expert_step
from lara_jax.evals.workers import LaneConfig, Lanes
from tests.evals.counting import REFUSES, Counting, ones


class Given:
    """A suite of environments that the test looks into."""

    name, tasks, step_limit = "given", ("place",), 1000

    def __init__(self, envs: Sequence[TabletopEnv]) -> None:
        self._envs: Iterator[gymnasium.Env[Any, np.ndarray]] = iter(envs)

    def make_env(self, task: str) -> gymnasium.Env[Any, np.ndarray]:
        return next(self._envs)

    def trial(self, task: str, index: int) -> Trial:
        return Trial(task=task, index=index, seed=episode_seed(0, "eval", index))


def expert_policy(envs: Sequence[TabletopEnv]) -> Any:
    """The scripted expert behind the interface of a policy: it peeks into the environments."""

    def policy(observations: Sequence[Any]) -> np.ndarray:
        assert len(observations) == len(envs)
        return np.stack([expert_step(env).action[None] for env in envs])

    return policy


def idle_policy(observations: Sequence[Any]) -> np.ndarray:
    return np.zeros((len(observations), 8, 7), np.float32)


def counted(policy: Any, goals: tuple[int, ...], lanes: int = 1, **options: Any) -> Rollouts:
    """Counting to goals, a few at a time."""
    suite = Counting(goals)
    views = options.pop("views", ())
    with Lanes(LaneConfig(suite=suite, views=views, watch="primary"), lanes) as open_lanes:
        return rollout(policy, open_lanes, trials(suite, len(goals)), **options)


def test_frames_of_earlier_steps_are_views_of_their_own() -> None:
    """None before the episode, then what was seen so many steps ago, also within a chunk."""
    seen: list[tuple[float, float | None]] = []

    def policy(observations: Sequence[Any]) -> np.ndarray:
        seen.extend((o["total"], o["total@-3"]) for o in observations)
        return np.ones((len(observations), 2, 7), np.float32)

    counted(policy, (8, 4), execute_steps=2, views=("total", "total@-3"))
    assert seen[:4] == [(0.0, None), (2.0, None), (4.0, 1.0), (6.0, 3.0)]
    # The second episode starts without a past.
    assert seen[4:] == [(0.0, None), (2.0, None)]


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_expert_succeeds_through_the_policys_interface(lanes: int) -> None:
    envs = [TabletopEnv(TabletopConfig(image_size_px=16)) for _ in range(lanes)]
    suite = Given(envs)
    chosen = trials(suite, 5 if lanes == 2 else 2)
    with Lanes(LaneConfig(suite=suite), lanes) as open_lanes:
        result = rollout(expert_policy(envs), open_lanes, chosen, execute_steps=1)
    assert [episode.trial for episode in result.episodes] == chosen
    assert result.successes == len(chosen) and result.success_rate == 1
    assert all(10 <= episode.steps <= 35 for episode in result.episodes)


def test_an_idle_policy_fails_and_runs_out_of_steps() -> None:
    config = TabletopConfig(image_size_px=16, max_steps=10)
    suite = Given([TabletopEnv(config) for _ in range(2)])
    with Lanes(LaneConfig(suite=suite), 2) as lanes:
        result = rollout(idle_policy, lanes, trials(suite, 3), execute_steps=4)
    assert result.successes == 0
    assert [episode.steps for episode in result.episodes] == [10] * 3
    assert len(result.call_seconds) == 2 * 3  # two rounds of ceil(10 / 4) calls
    assert result.interval[0] == 0 and 0 < result.interval[1] < 1


def test_the_suites_step_limit_ends_an_episode() -> None:
    suite = Counting((18,), step_limit=6)
    with Lanes(LaneConfig(suite=suite), 1) as lanes:
        result = rollout(ones, lanes, trials(suite, 1), execute_steps=4)
    assert (result.episodes[0].steps, result.episodes[0].success) == (6, False)


def test_stops_at_success_and_asks_again_after_the_executed_steps() -> None:
    seen: list[list[float]] = []

    def policy(observations: Sequence[Any]) -> np.ndarray:
        seen.append([observation["total"] for observation in observations])
        return ones(observations)

    result = counted(policy, (5, 2, 30), lanes=2, execute_steps=3, film_episodes=1)
    assert [episode.success for episode in result.episodes] == [True, True, False]
    assert [episode.steps for episode in result.episodes] == [5, 2, 21]
    # The second lane is done after 2 steps and begins the third episode; the first lane has nothing
    # left to do after its fifth step, and its row repeats the other's.
    assert seen[:2] == [[0, 0], [3, 0]]
    assert seen[2:] == [[3 * turn, 3 * turn] for turn in range(1, 7)]
    assert [int(frame[0, 0, 0]) for frame in result.episodes[0].frames] == [0, 1, 2, 3, 4, 5]
    assert result.episodes[1].frames == ()
    assert result.episodes[1].instruction == "count to 2"
    assert result.episodes[2].phase == "at 21"


def test_what_the_policy_saw_is_kept_of_chosen_episodes() -> None:
    keep, told = FirstOfEach(failed=1, solved=1), []
    result = counted(
        ones, (3, 30, 2, 30), execute_steps=2, keep=keep, on_episode=lambda e: told.append(e)
    )
    solved, failed, *others = result.episodes
    assert [(step, o["total"]) for step, o in solved.asked] == [(0, 0), (2, 2)]
    assert [int(frame[0, 0, 0]) for frame in solved.seen] == [0, 1, 2, 3]
    assert len(failed.seen) == 22
    assert all(other.asked == other.seen == () for other in others)
    assert [episode.steps for episode in told] == [3, 21, 2, 21]


def test_episodes_are_counted_by_task() -> None:
    def episode(task: str, *, success: bool) -> Episode:
        trial = Trial(task=task, index=0, seed=0)
        return Episode(trial=trial, instruction="", success=success, steps=4)

    episodes = (episode("a", success=True), episode("b", success=True), episode("a", success=False))
    parts = Rollouts(episodes=episodes, call_seconds=(9.0, 0.1, 0.3)).by_task()
    assert list(parts) == ["a", "b"]
    assert (parts["a"].successes, parts["a"].success_rate, parts["b"].success_rate) == (1, 0.5, 1)
    assert parts["b"].latency_ms_p50 == pytest.approx(200)


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


def not_finite(observations: Sequence[Any]) -> np.ndarray:
    return np.where([[[o["total"] >= 4]] for o in observations], np.nan, ones(observations))


@pytest.mark.parametrize(
    ("policy", "lanes", "goals", "execute_steps", "message"),
    [
        (ones, 1, (1,), 5, "execute 5 actions"),
        (ones, 1, (1,), 0, "at least one"),
        (ones, 1, (), 1, "at least one"),
        (ones, 0, (1,), 1, "at least 1 environment"),
        (lambda observations: np.zeros((1, 7)), 1, (1,), 1, r"\[1, C, A\]"),
        (lambda observations: np.zeros((1, 4, 7)), 2, (1, 2), 1, r"\[2, C, A\]"),
        (not_finite, 1, (2, 9), 4, r"count episode 1, step 4: .*must be finite, got \[\[nan"),
        (ones, 1, (1, REFUSES), 4, "count episode 1, step 0: no counting on Sundays"),
    ],
)
def test_wrong_use_raises(
    policy: Any, lanes: int, goals: tuple[int, ...], execute_steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        counted(policy, goals, lanes, execute_steps=execute_steps)


def test_an_action_of_another_size_is_refused_with_the_episodes_name() -> None:
    suite = Given([TabletopEnv(TabletopConfig(image_size_px=16))])
    with (
        Lanes(LaneConfig(suite=suite), 1) as lanes,
        pytest.raises(ValueError, match=r"place episode 0, step 0: .*\(7,\), got \(6,\)"),
    ):
        rollout(lambda o: np.zeros((1, 8, 6)), lanes, trials(suite, 1), execute_steps=1)
