"""A suite that needs no simulator: count up to the episode's seed. Worker processes import it."""

import os
import signal
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np

from lara_jax.evals.suites import Trial

LIMIT = 20
EXITS, IS_KILLED, REFUSES = 13, 14, 15  # goals at which a step does so


class Counter(gymnasium.Env[Any, np.ndarray]):
    """Solved once its actions sum up to its seed; the observation tells the sum."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.goal, self.total = int(seed or 0), 0.0
        return self._observation(), {"phase": "at 0"}

    def step(self, action: np.ndarray) -> Any:
        if self.goal == EXITS:
            os._exit(3)
        if self.goal == IS_KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.goal == REFUSES:
            raise ValueError("no counting on Sundays")
        self.total += float(action[0])
        solved, over = self.total == self.goal, self.total > LIMIT
        return self._observation(), 0.0, solved, over, {"phase": f"at {self.total:g}"}

    def render(self) -> Any:
        return np.full((4, 4, 3), int(self.total), np.uint8)

    def _observation(self) -> dict[str, Any]:
        return {
            "instruction": f"count to {self.goal}",
            "total": self.total,
            "primary": self.render(),
            "process": os.getpid(),
            "jax": "jax" in sys.modules,
        }


@dataclass(frozen=True)
class Counting:
    """Episode n of every task counts to `goals[n]`."""

    goals: tuple[int, ...]
    tasks: tuple[str, ...] = ("count",)
    step_limit: int = 100
    name: ClassVar[str] = "counting"

    def make_env(self, task: str) -> Counter:
        return Counter()

    def trial(self, task: str, index: int) -> Trial:
        return Trial(task=task, index=index, seed=self.goals[index])


def ones(observations: Any) -> np.ndarray:
    """A policy that counts by one, four times."""
    return np.ones((len(observations), 4, 1), np.float32)


@dataclass(frozen=True)
class Shortened:
    """Another suite, whose episodes last a few steps only."""

    suite: Any
    step_limit: int = 10
    name: ClassVar[str] = "shortened"

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.suite.tasks

    def make_env(self, task: str) -> Any:
        return self.suite.make_env(task)

    def trial(self, task: str, index: int) -> Trial:
        return self.suite.trial(task, index)
