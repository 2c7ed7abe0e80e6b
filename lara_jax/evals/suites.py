"""What a simulator has to say of itself so that the one evaluation loop can run it.

    suite     a name, its tasks, and how to make an environment for one of them
    trial     one episode to run: a task, its number, the seed and options of `reset`

The environments are Gymnasium's: observations are mappings with `instruction`, `state` and a frame
per camera, `terminated` means solved, `truncated` out of steps. Where a step's `info` has a
`phase`, that is the furthest that the episode has come to, in words.

A suite travels to the processes that step its environments: it is pickled, and the module that
defines it imports no device code.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One episode to run.

    Attributes:
      task: one of the suite's.
      index: its number among the task's, from 0.
      seed, options: for the environment's `reset`.
    """

    task: str
    index: int
    seed: int
    options: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"{self.task} episode {self.index}"


class Suite(Protocol):
    """A simulator's tasks.

    Attributes:
      name: as `lara eval --suite` knows it.
      tasks: names, in the order in which they are evaluated.
      step_limit: an episode of so many steps is over, if its environment has not said so before.
    """

    @property
    def name(self) -> str: ...

    @property
    def tasks(self) -> tuple[str, ...]: ...

    @property
    def step_limit(self) -> int: ...

    def make_env(self, task: str) -> gymnasium.Env[Any, np.ndarray]:
        """An environment for a task; it is closed where another task comes next."""
        ...

    def trial(self, task: str, index: int) -> Trial:
        """An episode by its number: the same whatever else is run."""
        ...


def trials(suite: Suite, episodes: int) -> list[Trial]:
    """So many episodes of each task, task by task."""
    return [suite.trial(task, index) for task in suite.tasks for index in range(episodes)]
