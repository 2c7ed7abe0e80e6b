"""Closed-loop evaluation: a policy acts in a simulator, and we count how often it solves the task.

One loop for every suite. E lanes (`lara_jax.evals.workers`) go in lock-step, so that the policy
answers a whole batch per call::

    E observations -> policy -> chunks float32[E, C, A] -> the first few actions of each -> ...

Every episode starts from its own fixed seed; a lane whose episode is over begins the next one. Lane
n is row n of the batch, and the number of rows never changes (a jitted policy compiles once): rows
of lanes that have nothing left to do repeat an observation, and their answers are ignored. So what
happens depends on the policy, the trials and E, and not on how many processes step the lanes.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from lara_jax.evals.suites import Trial
from lara_jax.evals.workers import Act, Begin, Lanes, Report

ALL = "all"
Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


class ChunkPolicy(Protocol):
    """What is evaluated: from E observations to E chunks of physical (un-normalised) actions."""

    def __call__(self, observations: Sequence[Any], /) -> np.ndarray:
        """Observations as the environment gives them -> float32[E, C, A]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One episode.

    Attributes:
      trial: task, number and seed.
      instruction: what the policy was told.
      success, steps: whether the task was solved, in how many steps.
      phase: the furthest that it came to, where the suite says so.
      seconds: wall time, which it shares with the lanes beside it.
      frames: uint8[R, R, 3] for people, first to last, where they were asked for.
      asked: when the policy was asked, where that was kept: steps before, and the observation.
      seen: the watched camera's frame before each step and after the last, where they were kept.
    """

    trial: Trial
    instruction: str
    success: bool
    steps: int
    phase: str = ""
    seconds: float = 0.0
    frames: tuple[np.ndarray, ...] = ()
    asked: tuple[tuple[int, Any], ...] = ()
    seen: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Episodes of an evaluation, and the wall time of each call of the policy and of the whole."""

    episodes: tuple[Episode, ...]
    call_seconds: tuple[float, ...] = ()
    seconds: float = 0.0

    @property
    def successes(self) -> int:
        """Number of solved episodes."""
        return sum(episode.success for episode in self.episodes)

    @property
    def success_rate(self) -> float:
        """Share of solved episodes, in [0, 1]."""
        return self.successes / len(self.episodes)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the success rate."""
        return wilson_interval(self.successes, len(self.episodes))

    @property
    def steps_mean(self) -> float:
        """Mean number of steps of an episode."""
        return float(np.mean([episode.steps for episode in self.episodes]))

    @property
    def latency_ms_p50(self) -> float:
        """Median wall time of one call of the policy, without the first, which compiles."""
        return float(np.median(self.call_seconds[1:] or self.call_seconds)) * 1e3

    def by_task(self) -> dict[str, "Rollouts"]:
        """The episodes of each task, in order of appearance; calls and time are those of all."""
        tasks = dict.fromkeys(episode.trial.task for episode in self.episodes)
        return {
            task: replace(self, episodes=tuple(e for e in self.episodes if e.trial.task == task))
            for task in tasks
        }

    def by_task_and_all(self) -> dict[str, "Rollouts"]:
        """`by_task`, and where there are several tasks one more entry, "all", last."""
        tasks = self.by_task()
        return {**tasks, ALL: self} if len(tasks) > 1 else tasks


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate; sensible at 0 and at 1 too.

    Args:
      successes: number of successes.
      trials: number of trials, at least 1.

    Returns:
      Lower and upper bound, in [0, 1].

    Raises:
      ValueError: on impossible counts.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials and trials >= 1: {successes}, {trials}")
    rate = successes / trials
    denominator = 1 + Z_95**2 / trials
    centre = (rate + Z_95**2 / (2 * trials)) / denominator
    spread = np.sqrt(rate * (1 - rate) / trials + Z_95**2 / (4 * trials**2)) * Z_95 / denominator
    return max(0.0, float(centre - spread)), min(1.0, float(centre + spread))


class FirstOfEach:
    """Says of an episode whether it is one of its task's first that failed, or that were solved."""

    def __init__(self, *, failed: int, solved: int) -> None:
        self._most = {False: failed, True: solved}
        self._counts: Counter[tuple[str, bool]] = Counter()

    def __call__(self, episode: Episode) -> bool:
        kind = (episode.trial.task, episode.success)
        self._counts[kind] += 1
        return self._counts[kind] <= self._most[episode.success]


def rollout(
    policy: ChunkPolicy,
    lanes: Lanes,
    trials: Sequence[Trial],
    *,
    execute_steps: int,
    film_episodes: int = 0,
    keep: Callable[[Episode], bool] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> Rollouts:
    """Runs episodes.

    Args:
      policy: is asked for a chunk whenever its last one has been executed.
      lanes: where environments are stepped.
      trials: the episodes.
      execute_steps: how many actions of each chunk are executed.
      film_episodes: of so many first episodes `frames` are made.
      keep: whether `asked` and `seen` of an episode stay, once it is over; by default, of none.
      on_episode: is told of each episode as it ends.

    Returns:
      The episodes, in the order of the trials.

    Raises:
      ValueError: there is no trial, a chunk has the wrong shape, is too short or not finite, or an
        environment refuses an action.
      ChildProcessError: a process that steps lanes has died.
    """
    if not trials or execute_steps < 1:
        raise ValueError(
            "need at least one episode and one step to execute, "
            f"got {len(trials)} and {execute_steps}"
        )
    waiting = deque(enumerate(trials))
    episodes: dict[int, Episode] = {}
    call_seconds: list[float] = []
    runs: dict[int, _Run] = {}
    began = time.perf_counter()
    with tqdm(total=len(trials), desc="rollouts", unit="episode") as progress:
        while waiting or runs:
            free = [lane for lane in range(lanes.count) if lane not in runs]
            begun = {lane: waiting.popleft() for lane in free[: len(waiting)]}
            begins = {
                lane: Begin(trial=trial, film=number < film_episodes)
                for lane, (number, trial) in begun.items()
            }
            for lane, report in lanes.run(begins).items():
                runs[lane] = _Run(*begun[lane], report)

            asked = {lane: run.ask() for lane, run in runs.items()}
            filling = asked[min(asked)]
            observations = [asked.get(lane, filling) for lane in range(lanes.count)]
            called = time.perf_counter()
            chunks = np.asarray(policy(observations))
            call_seconds.append(time.perf_counter() - called)
            _check_chunks(chunks, runs, lanes.count, execute_steps)
            acts = {lane: Act(actions=chunks[lane, :execute_steps]) for lane in runs}
            for lane, report in lanes.run(acts).items():
                run = runs[lane]
                run.take(report)
                if report.over:
                    episode = runs.pop(lane).episode(keep)
                    episodes[run.number] = episode
                    progress.update()
                    if on_episode is not None:
                        on_episode(episode)
    return Rollouts(
        episodes=tuple(episodes[number] for number in range(len(trials))),
        call_seconds=tuple(call_seconds),
        seconds=time.perf_counter() - began,
    )


class _Run:
    """An episode under way, as its lane reports it."""

    def __init__(self, number: int, trial: Trial, report: Report) -> None:
        self.number, self.trial = number, trial
        self._asked: list[tuple[int, Any]] = []
        self._frames: list[np.ndarray] = []
        self._seen: list[np.ndarray] = []
        self._began = time.perf_counter()
        self.take(report)

    def take(self, report: Report) -> None:
        """Takes a report in."""
        self.report = report
        self._frames += report.film
        self._seen += report.seen

    def ask(self) -> Any:
        """The observation that the policy is asked with."""
        self._asked.append((self.report.steps, self.report.observation))
        return self.report.observation

    def episode(self, keep: Callable[[Episode], bool] | None) -> Episode:
        """The result."""
        episode = Episode(
            trial=self.trial,
            instruction=str(self.report.observation["instruction"]),
            success=self.report.success,
            steps=self.report.steps,
            phase=self.report.phase,
            seconds=time.perf_counter() - self._began,
            frames=tuple(self._frames),
        )
        if keep is None or not keep(episode):
            return episode
        return replace(episode, asked=tuple(self._asked), seen=tuple(self._seen))


def _check_chunks(
    chunks: np.ndarray, runs: dict[int, _Run], count: int, execute_steps: int
) -> None:
    if chunks.ndim != 3 or len(chunks) != count:
        raise ValueError(f"the policy must return [{count}, C, A] actions, got {chunks.shape}")
    if chunks.shape[1] < execute_steps:
        raise ValueError(
            f"cannot execute {execute_steps} actions of chunks that have {chunks.shape[1]}"
        )
    for lane, run in runs.items():
        if not np.isfinite(chunks[lane]).all():
            raise ValueError(
                f"{run.trial}, step {run.report.steps}: the policy's actions must be finite, got "
                f"{chunks[lane].tolist()}"
            )
