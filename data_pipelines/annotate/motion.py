"""The motion text: where the gripper goes until its phase ends, and what it does just now.

    position now           (0.10, 0.02, 0.18)
      at the phase's end   (0.15, 0.05, 0.02)
      in 0.6 s             (0.14, 0.02, 0.18)
    "Move forward and left, then down. Now move forward."

Two sentences, global and local. Each names the directions of one displacement in the robot's frame:
forward or backward, left or right, then up or down. A direction is named if its part is over
NAMED_M and over DOMINANCE of the largest part; then turns (counterclockwise is as seen from
above; a tilt is named after the side to which the gripper's top leans). With nothing to name:
"Hold still.". While it grasps or releases, both sentences are about the gripper.

The robot's frame has x forward, y left, z up, as most robots' bases; `Axes` says it for others.

Source: LaRA-VLA (arXiv 2602.01166), annotation: motion text from the gripper's path, global toward
the segment's goal and local, in discretised directions. The local window and the idea of naming
parts relative to the whole are those of Embodied Chain-of-Thought's move primitives (arXiv
2407.08693): over 4 states, a part of over a third of the displacement's L1 norm, at least 3 cm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipelines.annotate.anchors import Segment

# Least displacement and turn with a name, and least share of the largest displacement.
NAMED_M, NAMED_RAD, DOMINANCE = 0.01, 0.3, 0.25
# How far "now" reaches.
LOCAL_SECONDS = 0.6
_MOVES = (("forward", "backward"), ("left", "right"), ("up", "down"))
_TURNS = (
    ("tilt right", "tilt left"),
    ("tilt forward", "tilt backward"),
    ("turn counterclockwise", "turn clockwise"),
)


@dataclass(frozen=True, kw_only=True)
class Axes:
    """Which axis of a dataset's coordinates points where: "+x" to "-z".

    Attributes:
      forward, left, up: as seen from the robot's base.
    """

    forward: str = "+x"
    left: str = "+y"
    up: str = "+z"

    def __post_init__(self) -> None:
        named = (self.forward, self.left, self.up)
        if any(len(axis) != 2 or axis[0] not in "+-" or axis[1] not in "xyz" for axis in named):
            raise ValueError(f"axes forward, left, up are {','.join(named)}; allowed: +x to -z")
        if round(np.linalg.det(self.matrix)) != 1:
            raise ValueError(
                f"axes forward, left, up are {','.join(named)}: that is no right-handed frame"
            )

    @classmethod
    def parse(cls, text: str) -> "Axes":
        """From "+x,+y,+z": forward, left, up."""
        axes = text.split(",")
        if len(axes) != 3:
            raise ValueError(f"axes {text!r}; expected forward,left,up as in +x,+y,+z")
        return cls(forward=axes[0], left=axes[1], up=axes[2])

    @cached_property
    def matrix(self) -> np.ndarray:
        """float64[3, 3], from the dataset's coordinates to forward, left, up."""
        rows = np.zeros((3, 3))
        for row, axis in zip(rows, (self.forward, self.left, self.up), strict=True):
            row["xyz".index(axis[1])] = 1 if axis[0] == "+" else -1
        return rows


_BASE = Axes()  # of most robots


def motion_texts(
    segments: Sequence[Segment],
    positions: np.ndarray,
    turns: np.ndarray | None,
    control_hz: float,
    axes: Axes = _BASE,
) -> list[str]:
    """The motion text of every row.

    Args:
      segments: of the episode, covering its rows.
      positions: float[N, 3], m, of the gripper.
      turns: float[N, 3], rad, rotation that each row's action makes about x, y and z; None where
        that is not known.
      control_hz: steps a second.
      axes: the robot's frame.

    Returns:
      N texts of two sentences.
    """
    window = max(1, round(LOCAL_SECONDS * control_hz))
    wrapped = np.zeros((len(positions), 3)) if turns is None else _wrap(turns)
    turned = np.concatenate([np.zeros((1, 3)), np.cumsum(wrapped, axis=0)])  # before each row
    # Nothing is known of the motion after the last row.
    places = np.concatenate([positions, positions[-1:]])
    texts = []
    for segment in segments:
        gripper = {"grasp": -1, "release": 1}.get(segment.phase, 0)
        for row in range(segment.start, segment.stop):
            there, soon = segment.stop, min(row + window, segment.stop)
            if gripper:  # the arm stands still meanwhile: its way is a tremor
                there = soon = row
            towards, now = (
                describe(places[end] - places[row], turned[end] - turned[row], gripper, axes)
                for end in (there, soon)
            )
            texts.append(f"{towards} Now {now[0].lower()}{now[1:]}")
    return texts


def describe(
    displacement: np.ndarray,
    rotation: np.ndarray,
    gripper_change: int,
    axes: Axes = _BASE,
) -> str:
    """A motion in one sentence.

    Args:
      displacement: float[3], m, in the dataset's coordinates.
      rotation: float[3], rad, about x, y and z.
      gripper_change: +1 opens, -1 closes, 0 stays.
      axes: the robot's frame.

    Returns:
      `([0.05, 0.03, -0.1], [0, 0, 0.5], -1)` ->
      "Move forward and left, then down, turn counterclockwise, close the gripper."
    """
    parts = axes.matrix @ displacement
    least = max(NAMED_M, DOMINANCE * float(np.abs(parts).max()))
    named = _names(_MOVES, parts, least)
    sideways = " and ".join(filter(None, named[:2]))
    moves = ", then ".join(filter(None, (sideways, named[2])))
    words = [f"move {moves}"] if moves else []
    words += filter(None, _names(_TURNS, axes.matrix @ rotation, NAMED_RAD))
    if gripper_change:
        words.append("open the gripper" if gripper_change > 0 else "close the gripper")
    text = ", ".join(words) or "hold still"
    return f"{text[0].upper()}{text[1:]}."


def _names(words: Sequence[tuple[str, str]], parts: np.ndarray, least: float) -> list[str]:
    """The word of each part that is large enough, else ""."""
    return [
        (plus if part > 0 else minus) if abs(part) > least else ""
        for (plus, minus), part in zip(words, parts, strict=True)
    ]


def _wrap(angles: np.ndarray) -> np.ndarray:
    """Angles in [-pi, pi): differences of Euler angles jump where these wrap around."""
    return (np.asarray(angles, np.float64) + np.pi) % (2 * np.pi) - np.pi
