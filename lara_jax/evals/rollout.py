"""Closed-loop evaluation: a policy acts in a simulator, and we count how often it solves the task.

One loop. E environments go in lock-step, so that the policy answers a whole batch per call::

    E observations -> policy -> chunks float32[E, C, A] -> the first few actions of each -> ...

Every episode starts from its own fixed seed, and an environment that is done waits for the others.
The number of observations per call never changes (a jitted policy compiles once): environments that
are done, or not needed in the last round, repeat an observation, and their answers are ignored.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
from tqdm import tqdm

from data_pipelines.sampling import parse_view
from lara_jax.evals.report import format_table, save_gif
from lara_jax.evals.tabletop import TabletopConfig, TabletopEnv, episode_seed

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


class ChunkPolicy(Protocol):
    """What is evaluated: from E observations to E chunks of physical (un-normalised) actions."""

    def __call__(self, observations: Sequence[Any], /) -> np.ndarray:
        """Observations as the environment gives them -> float32[E, C, A]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode: its seed and instruction, whether the task was solved, in how many steps.

    `frames` holds uint8[R, R, 3] images, first to last, where they were asked for.
    """

    seed: int
    instruction: str
    success: bool
    steps: int
    frames: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """All episodes of an evaluation, and the wall time of each call of the policy."""

    episodes: tuple[Episode, ...]
    call_seconds: tuple[float, ...]

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
    def latency_ms_p50(self) -> float:
        """Median wall time of one call of the policy, without the first, which compiles."""
        return float(np.median(self.call_seconds[1:] or self.call_seconds)) * 1e3


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


def rollout(
    policy: ChunkPolicy,
    envs: Sequence[gymnasium.Env[Any, np.ndarray]],
    seeds: Sequence[int],
    *,
    execute_steps: int,
    views: Sequence[str] = (),
    record_episodes: int = 0,
) -> Rollouts:
    """Runs one episode per seed.

    Args:
      policy: is asked for a chunk whenever its last one has been executed.
      envs: E environments whose `terminated` means solved; they run in lock-step.
      seeds: of the episodes.
      execute_steps: how many actions of each chunk are executed.
      views: those the policy reads; for one such as "primary@-2" it is given the primary frame of
        two steps earlier, None before the episode.
      record_episodes: of so many first episodes the frames are kept.

    Returns:
      The episodes, in the order of the seeds.

    Raises:
      ValueError: there is no environment or seed, or a chunk has the wrong shape or is too short.
    """
    if not envs or not seeds or execute_steps < 1:
        raise ValueError(
            "need at least one environment, one seed and one step to execute, "
            f"got {len(envs)}, {len(seeds)} and {execute_steps}"
        )
    episodes: list[Episode] = []
    call_seconds: list[float] = []
    with tqdm(total=len(seeds), desc="rollouts", unit="episode") as progress:
        for start in range(0, len(seeds), len(envs)):
            runs = [
                _Run(env, seed, views=views, record=start + offset < record_episodes)
                for offset, (env, seed) in enumerate(
                    zip(envs, seeds[start : start + len(envs)], strict=False)
                )
            ]
            while not all(run.over for run in runs):
                observations = [run.observation for run in runs]
                observations += observations[:1] * (len(envs) - len(runs))
                began = time.perf_counter()
                chunks = np.asarray(policy(observations))
                call_seconds.append(time.perf_counter() - began)
                _check_chunks(chunks, len(envs), execute_steps)
                for run, chunk in zip(runs, chunks, strict=False):
                    progress.update(run.execute(chunk[:execute_steps]))
            episodes += [run.episode() for run in runs]
    return Rollouts(episodes=tuple(episodes), call_seconds=tuple(call_seconds))


class _Run:
    """One episode under way in one environment."""

    def __init__(
        self, env: gymnasium.Env[Any, np.ndarray], seed: int, *, views: Sequence[str], record: bool
    ) -> None:
        self._env = env
        earlier = {view: parse_view(view) for view in views}
        self._earlier = {view: (key, steps) for view, (key, steps) in earlier.items() if steps}
        self._seen: list[Any] = []
        self._seed = seed
        self._record = record
        self._steps = 0
        self._success = False
        self.over = False
        self._observe(env.reset(seed=seed)[0])
        self._frames: list[np.ndarray] = []
        self._keep_frame()

    def execute(self, actions: np.ndarray) -> bool:
        """Executes actions until they or the episode end; True if the episode ended just now."""
        for action in () if self.over else actions:
            observation, _, self._success, truncated, _ = self._env.step(action)
            self._observe(observation)
            self._steps += 1
            self._keep_frame()
            if self._success or truncated:
                self.over = True
                return True
        return False

    def episode(self) -> Episode:
        """The result."""
        return Episode(
            seed=self._seed,
            instruction=self.observation["instruction"],
            success=self._success,
            steps=self._steps,
            frames=tuple(self._frames),
        )

    def _observe(self, observation: Any) -> None:
        """Takes in what the environment shows, and adds the frames of earlier steps."""
        longest = max((steps for _, steps in self._earlier.values()), default=0)
        self._seen = [*self._seen[-longest:], observation] if longest else []
        history = {
            view: self._seen[-1 - steps][key] if steps < len(self._seen) else None
            for view, (key, steps) in self._earlier.items()
        }
        self.observation = {**observation, **history}

    def _keep_frame(self) -> None:
        if self._record:
            self._frames.append(np.asarray(self._env.render()))


def _check_chunks(chunks: np.ndarray, count: int, execute_steps: int) -> None:
    if chunks.ndim != 3 or len(chunks) != count:
        raise ValueError(f"the policy must return [{count}, C, A] actions, got {chunks.shape}")
    if chunks.shape[1] < execute_steps:
        raise ValueError(
            f"cannot execute {execute_steps} actions of chunks that have {chunks.shape[1]}"
        )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A family of environments: the name of its task, and how to make one for an image size."""

    task: str
    make_env: Callable[[int], gymnasium.Env[Any, np.ndarray]]


def _tabletop(image_size_px: int) -> TabletopEnv:
    return TabletopEnv(TabletopConfig(image_size_px=image_size_px))


SUITES: dict[str, Suite] = {"tabletop": Suite(task="place", make_env=_tabletop)}


def main(argv: Sequence[str]) -> int:
    """Runs `lara eval`; with `--json` one object per suite and task on standard output."""
    arguments = _parser().parse_args(argv)
    if arguments.suite not in SUITES:
        raise ValueError(f"unknown suite {arguments.suite!r}, available: {', '.join(SUITES)}")
    if min(arguments.episodes, arguments.parallel) < 1:
        raise ValueError(
            f"--episodes and --parallel must be at least 1, "
            f"got {arguments.episodes} and {arguments.parallel}"
        )
    suite = SUITES[arguments.suite]
    # Imported here because only the command line knows about models.
    from lara_jax.inference.policy import Policy

    policy = Policy.from_workdir(
        arguments.workdir, latent_slots=arguments.latent_slots, dataset=arguments.dataset
    )
    parallel = min(arguments.parallel, arguments.episodes)
    result = rollout(
        policy,
        [suite.make_env(arguments.image_size) for _ in range(parallel)],
        [episode_seed(arguments.seed, "eval", index) for index in range(arguments.episodes)],
        execute_steps=arguments.execute_steps,
        views=policy.views,
        record_episodes=arguments.gif_episodes if arguments.gif else 0,
    )
    low, high = result.interval
    summary = {
        "suite": arguments.suite,
        "task": suite.task,
        "episodes": len(result.episodes),
        "successes": result.successes,
        "success_rate": result.success_rate,
        "ci_low": low,
        "ci_high": high,
        "latent_slots": policy.latent_slots,
        "latency_ms_p50": result.latency_ms_p50,
    }
    if arguments.gif:
        save_gif(arguments.gif, [_captioned(episode) for episode in result.episodes])
    if arguments.json:
        print(json.dumps({**summary, "parallel": parallel}))
    else:
        print(format_table(list(summary), [list(summary.values())]))
    print(f"one call of the policy serves {parallel} environments", file=sys.stderr)
    return 0


def _captioned(episode: Episode) -> tuple[Sequence[np.ndarray], str]:
    verdict = "solved" if episode.success else "not solved"
    return episode.frames, f"{episode.instruction}\n{verdict}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lara eval", description="Closed-loop success rate.")
    parser.add_argument("--workdir", required=True, type=Path, help="directory of a training run")
    parser.add_argument("--suite", default="tabletop", help=f"one of: {', '.join(SUITES)}")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--latent-slots", type=int, help="K (default: as trained)")
    parser.add_argument("--dataset", help="whose statistics to act with, after a mixture")
    parser.add_argument("--seed", type=int, default=0, help="chooses the episodes")
    parser.add_argument(
        "--execute-steps", type=int, default=4, help="actions executed of each chunk"
    )
    parser.add_argument("--parallel", type=int, default=10, help="environments in lock-step")
    parser.add_argument("--image-size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--gif", type=Path, help="where to save an animation of the first episodes")
    parser.add_argument("--gif-episodes", type=int, default=4, help="how many it shows")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser
