"""Who puts an episode's phases into words and finds its objects: two interfaces, one default.

A `SubtaskWriter` gives one text for each segment, a `BoxDetector` one box for each phrase and
image. `RuleWriter` needs the instruction only. There is no detector by rule: without a model, boxes
are left out and counted, rather than guessed.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data_pipelines.annotate.anchors import GRASP_VERBS, Goal, Segment, parse_instruction
from data_pipelines.annotate.view import EpisodeView
from lara_jax.tokenizers.prompt import Box

# Relations that carrying something "to" a place says as well.
_TO = ("on", "onto", "on to", "on top of", "on the top of", "in", "into", "inside", "inside of",
       "to", "towards", "toward", "at")  # fmt: skip


class SubtaskWriter(Protocol):
    """Says what the robot does in each segment. It may be called from several threads."""

    @property
    def name(self) -> str:
        """What wrote the texts; changes whenever they may."""

    def subtasks(self, view: EpisodeView, segments: Sequence[Segment]) -> Sequence[str]:
        """One text for each segment, as "move to the red block"; "" where there is none."""


class BoxDetector(Protocol):
    """Finds objects in images. It may be called from several threads."""

    @property
    def name(self) -> str:
        """What found the boxes; changes whenever they may."""

    def boxes(
        self, images: Sequence[np.ndarray], phrases: Sequence[str]
    ) -> Sequence[Sequence[Box | None]]:
        """Finds each phrase in each image.

        Args:
          images: uint8[H, W, 3], RGB, all of one size.
          phrases: as "red block".

        Returns:
          By image and phrase, the best box, normalised; None where it was not found.
        """


class RuleWriter:
    """Subtask texts from the phase and the objects that the instruction names.

    approach "move to the spoon", grasp "grasp the spoon", move "carry the spoon to the towel" or
    "lift the spoon", release "release the spoon", retreat "retreat". Where the gripper does
    nothing, or the instruction names no object, the subtask is the instruction itself.
    """

    name = "rules 1"

    def subtasks(self, view: EpisodeView, segments: Sequence[Segment]) -> list[str]:
        """See `SubtaskWriter`."""
        idle = len(segments) == 1
        texts = []
        for segment in segments:
            instruction = view.instructions[segment.start].strip().rstrip(".")
            goal = goal_of(instruction, segment.cycle)
            known = not idle and goal is not None and goal.verb and goal.object
            texts.append(_subtask(segment.phase, goal) if known and goal else instruction)
        return texts


def goal_of(instruction: str, cycle: int) -> Goal | None:
    """The goal of a pick-and-place cycle: goals come in order; the last serves all that follow."""
    goals = parse_instruction(instruction)
    return goals[min(cycle, len(goals) - 1)] if goals else None


def _subtask(phase: str, goal: Goal) -> str:
    thing = f"the {goal.object}"
    match phase:
        case "approach":
            return f"move to {thing}"
        case "retreat":
            return "retreat"
        case "move" if goal.destination:
            relation = "to" if goal.relation in _TO else goal.relation
            return f"carry {thing} {relation} the {goal.destination}"
        case "move":
            return f"{'lift' if goal.verb in GRASP_VERBS else goal.verb} {thing}"
        case _:
            return f"{phase} {thing}"
