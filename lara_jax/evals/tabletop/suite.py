"""The tabletop as a suite of `lara eval`: its task families, on one of its held-out splits."""

from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np

from lara_jax.evals.suites import Trial
from lara_jax.evals.tabletop.environment import RELEASED_OPENING, TabletopEnv, episode_seed
from lara_jax.evals.tabletop.expert import expert_step
from lara_jax.evals.tabletop.scene import TabletopConfig
from lara_jax.evals.tabletop.tasks import FAMILIES, SPLITS

HELD_OUT = tuple(split for split in SPLITS if split != "train")
MOST_MOVES = 2  # of a task
LIFTED_M = 0.05  # a block so far above its rest on the table has been picked up

# How far a move has come, by what the expert would do next.
OTHER_BLOCK = "lifted another block"
PHASES = (
    "not reached",
    OTHER_BLOCK,
    "above the block",
    "at the block",
    "grasped",
    "lifted",
    "above the target",
    "on the target",
    "solved",
)
NEXT_SUBTASK = {
    "lower to": "above the block",
    "grasp the": "at the block",
    "lift the": "grasped",
    "lower onto": "above the target",
    "release the": "on the target",
    "retreat": "solved",
}


@dataclass(frozen=True, kw_only=True)
class TabletopSuite:
    """Families of tasks on one split.

    Attributes:
      families: keys of `tasks.FAMILIES`; each is a task of the suite.
      split: a key of `tasks.SPLITS` other than "train".
      cameras: of the observations, "primary" first.
      image_size_px: side of their square images.
      seed: chooses the episodes.
    """

    name: ClassVar[str] = "tabletop"

    families: tuple[str, ...] = ("place",)
    split: str = "eval"
    cameras: tuple[str, ...] = ("primary",)
    image_size_px: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in HELD_OUT:
            raise ValueError(f"unknown split {self.split!r}, allowed: {', '.join(HELD_OUT)}")
        if len(set(self.families)) < len(self.families):
            raise ValueError(f"families are named twice: {', '.join(self.families)}")
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(f"unknown family {family!r}, allowed: {', '.join(FAMILIES)}")
        self._config(self.families)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The families."""
        return self.families

    @property
    def step_limit(self) -> int:
        """Of the longest task; the environment says sooner when one of fewer moves is over."""
        return self._config(self.families).max_steps * MOST_MOVES

    def make_env(self, task: str) -> "WithPhase":
        """A tabletop with tasks of one family, whose `info` has the phase."""
        return WithPhase(TabletopEnv(self._config((task,))))

    def trial(self, task: str, index: int) -> Trial:
        """An episode by its number; those of two families with one number share the seed."""
        return Trial(task=task, index=index, seed=episode_seed(self.seed, self.split, index))

    def _config(self, families: tuple[str, ...]) -> TabletopConfig:
        return TabletopConfig(
            families=families,
            split=self.split,
            cameras=self.cameras,
            image_size_px=self.image_size_px,
        )


class WithPhase(gymnasium.Wrapper[Any, np.ndarray, Any, np.ndarray]):
    """Adds to `info` the furthest phase that an episode has come to, one of `PHASES`.

    In tasks of two moves the phase says which it is of: "move 2: grasped".

    Args:
      env: kept as `tabletop`.
    """

    def __init__(self, env: TabletopEnv) -> None:
        super().__init__(env)
        self.tabletop = env
        self._furthest = (0, 0)  # moves done, and number of the next one's phase

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """As the tabletop's, with the phase."""
        observation, info = self.tabletop.reset(seed=seed, options=options)
        self._furthest = (0, 0)
        self._look()
        return observation, info | {"phase": self._phase}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """As the tabletop's, with the phase."""
        observation, reward, solved, truncated, info = self.tabletop.step(action)
        self._look()
        return observation, reward, solved, truncated, info | {"phase": self._phase}

    @property
    def _phase(self) -> str:
        done, number = self._furthest
        one_of_several = len(self.tabletop.moves) > 1 and PHASES[number] != "solved"
        return f"move {done + 1}: {PHASES[number]}" if one_of_several else PHASES[number]

    def _look(self) -> None:
        """Takes in how far the task has come now."""
        env, done = self.tabletop, self._furthest[0]
        if env.gripper_command > 0.5 and env.gripper_opening > RELEASED_OPENING:
            placed = sum(map(env.placed, env.moves))
            done = max(done, min(placed, len(env.moves) - 1))
        self._furthest = max(self._furthest, (done, PHASES.index(self._present())))

    def _present(self) -> str:
        """The phase of the move that the expert would go on with."""
        env, expert = self.tabletop, expert_step(self.tabletop)
        subtask = " ".join(expert.subtask.split()[:2])
        if subtask != "move to":
            return NEXT_SUBTASK[subtask]
        if expert.action[6] < 0.5:
            return "lifted"
        own = {move.block for move in env.moves}
        high = env.config.block_half_m + LIFTED_M
        others = (block for block in env.block_names if block not in own)
        return OTHER_BLOCK if any(env.centre_m(block)[2] > high for block in others) else PHASES[0]
