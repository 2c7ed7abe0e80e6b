"""Directions in words: thresholds, dominance, frames, turns."""

import numpy as np
import pytest

from data_pipelines.annotate.anchors import Segment
from data_pipelines.annotate.motion import Axes, describe, motion_texts

NONE = np.zeros(3)


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ((0.05, 0.03, -0.1), "Move forward and left, then down."),
        ((-0.05, -0.03, 0.1), "Move backward and right, then up."),
        ((0.0, 0.2, 0.0), "Move left."),
        ((0.0, 0.0, -0.011), "Move down."),
        ((0.009, -0.009, 0.009), "Hold still."),
        # Under a quarter of the largest part.
        ((0.2, 0.04, -0.06), "Move forward, then down."),
    ],
)
def test_directions(way: tuple[float, ...], text: str) -> None:
    assert describe(np.array(way), NONE, 0) == text


@pytest.mark.parametrize(
    ("rotation", "text"),
    [
        ((0, 0, 0.4), "Turn counterclockwise."),
        ((0, 0, -0.4), "Turn clockwise."),
        ((0.4, 0, 0), "Tilt right."),
        ((0, 0.4, 0), "Tilt forward."),
        ((0, -0.4, 0.2), "Tilt backward."),
        ((0.2, 0.2, 0.2), "Hold still."),
    ],
)
def test_turns(rotation: tuple[float, ...], text: str) -> None:
    assert describe(NONE, np.array(rotation), 0) == text


@pytest.mark.parametrize("axis", [0, 1])
def test_tilt_names_where_the_top_leans(axis: int) -> None:
    rotation = np.zeros(3)
    rotation[axis] = 0.5
    top = np.cross(rotation, (0, 0, 1))  # how the top moves, to first order
    leans = describe(top, NONE, 0).split()[-1]
    assert describe(NONE, rotation, 0) == f"Tilt {leans}"


def test_all_at_once() -> None:
    text = describe(np.array([0.05, 0.03, -0.1]), np.array([0, 0, 0.5]), -1)
    assert text == "Move forward and left, then down, turn counterclockwise, close the gripper."


def test_other_frame() -> None:
    axes = Axes.parse("-y,+x,+z")
    assert describe(np.array([0.1, 0.05, 0.0]), NONE, 0, axes) == "Move backward and left."
    assert describe(NONE, np.array([0.0, -0.5, 0.0]), 0, axes) == "Tilt right."


@pytest.mark.parametrize("axes", ["+x,+y", "+x,+y,-z", "+x,+x,+z", "x,y,z", "+x,+y,+w"])
def test_bad_frame(axes: str) -> None:
    with pytest.raises(ValueError, match="axes"):
        Axes.parse(axes)


def test_global_and_local() -> None:
    """Forward for 3 rows, down for 3, then the gripper closes while the arm trembles."""
    steps = [(0.05, 0, 0)] * 3 + [(0, 0, -0.05)] * 3 + [(0.02, 0, 0)] * 2
    positions = np.cumsum([(0, 0, 0), *steps[:-1]], axis=0, dtype=float)
    segments = [
        Segment(phase="approach", start=0, stop=6),
        Segment(phase="grasp", start=6, stop=8),
    ]
    texts = motion_texts(segments, positions, None, control_hz=5.0)
    assert texts == [
        "Move forward, then down. Now move forward.",
        "Move forward, then down. Now move forward, then down.",
        "Move forward, then down. Now move forward, then down.",
        "Move down. Now move down.",
        "Move down. Now move down.",
        "Move down. Now move down.",
        "Close the gripper. Now close the gripper.",
        "Close the gripper. Now close the gripper.",
    ]


def test_turns_are_summed_across_the_wrap() -> None:
    turns = np.zeros((4, 3))
    turns[:, 2] = 0.2
    turns[1, 2] -= 2 * np.pi  # a difference of two Euler angles on both sides of pi
    segments = [Segment(phase="move", start=0, stop=4)]
    texts = motion_texts(segments, np.zeros((4, 3)), turns, control_hz=5.0)
    assert texts[0] == "Turn counterclockwise. Now turn counterclockwise."
    assert texts[3] == "Hold still. Now hold still."
