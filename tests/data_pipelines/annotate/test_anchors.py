"""Phases from the gripper, objects from the instruction."""

import numpy as np
import pytest

from data_pipelines.annotate.anchors import (
    Goal,
    parse_instruction,
    segment_episode,
)

LETTERS = {"a": "approach", "g": "grasp", "m": "move", "r": "release", "t": "retreat"}


def drawn(gripper: str, **kwargs: np.ndarray | None) -> tuple[str, str]:
    """Phases and cycles, a letter and a digit a row; at 5 Hz a grasp lasts up to 5 rows."""
    signal = np.array([int(x) / 9 for x in gripper])
    segments = segment_episode(signal, kwargs.get("positions"), 5.0)
    initials = {phase: letter for letter, phase in LETTERS.items()}
    rows = [(initials[s.phase], str(s.cycle)) for s in segments for _ in range(s.start, s.stop)]
    assert [segment.start for segment in segments[1:]] == [s.stop for s in segments[:-1]]
    return "".join(letter for letter, _ in rows), "".join(cycle for _, cycle in rows)


@pytest.mark.parametrize(
    ("gripper", "phases", "cycles"),
    [
        ("999990000000999999", "aaaaagggggmmrrrrrt", "0" * 18),
        ("9999900000", "aaaaaggggg", "0" * 10),
        # Two cycles; the second ends as soon as it lets go.
        ("99990000009999990000009", "aaaagggggmrrrrragggggmr", "0" * 15 + "1" * 8),
        # Closed at first: it opens to grasp something, or it holds something already.
        ("0009999000000", "aaaaaaagggggm", "0" * 13),
        ("0000099999999", "mmmmmrrrrrttt", "0" * 13),
        ("99999", "mmmmm", "00000"),
        ("00000", "mmmmm", "00000"),
        ("9", "m", "0"),
        # A grasp so short that nothing is moved.
        ("9990009999", "aaagggrrrr", "0" * 10),
        # Flickers of one row, at the start and in between.
        ("0999900000999999", "aaaaagggggrrrrrt", "0" * 16),
        ("9990990000000999", "aaaaaagggggmmrrr", "0" * 16),
        ("9990000900000999", "aaagggggmmmmmrrr", "0" * 16),
        # Between the thresholds nothing changes: 4 and 5 of 9 are 0.44 and 0.56.
        ("9955544400000045", "aaaaaaaagggggmmm", "0" * 16),
    ],
)
def test_phases(gripper: str, phases: str, cycles: str) -> None:
    assert drawn(gripper) == (phases, cycles)


def test_grasp_ends_when_the_arm_moves_on() -> None:
    positions = np.zeros((12, 3))
    positions[6:, 2] = 0.03 * np.arange(1, 7)  # 0.15 m/s from row 5 on
    phases, _ = drawn("999000000000", positions=positions)
    assert phases == "aaaggmmmmmmm"
    slow = positions / 10
    assert drawn("999000000000", positions=slow)[0] == "aaagggggmmmm"


def goal(verb: str, object: str, relation: str = "", destination: str = "") -> Goal:
    return Goal(verb=verb, object=object, relation=relation, destination=destination)


@pytest.mark.parametrize(
    ("instruction", "goals"),
    [
        (
            "put the red block on the yellow plate",
            [goal("put", "red block", "on", "yellow plate")],
        ),
        ("Put carrot on plate.", [goal("put", "carrot", "on", "plate")]),
        ("move 7up can near apple", [goal("move", "7up can", "near", "apple")]),
        (
            "put the spoon to the left of the pot",
            [goal("put", "spoon", "to the left of", "pot")],
        ),
        (
            "put cup from counter or drying rack into sink",
            [goal("put", "cup", "into", "sink")],
        ),
        ("put spoon in pot from the table", [goal("put", "spoon", "in", "pot")]),
        ("pick up the coke can", [goal("pick up", "coke can")]),
        ("pick the apple up", [goal("pick", "apple")]),
        ("please close the top drawer", [goal("close", "top drawer")]),
        ("flip pot upright which is in sink", [goal("flip", "pot")]),
        ("turn lever vertical to front", [goal("turn", "lever vertical")]),
        ("put down the spoon", [goal("put", "spoon")]),
        (
            "pick up the black bowl between the plate and the ramekin and place it on the plate",
            [goal("place", "black bowl", "on", "plate")],
        ),
        (
            "take the lid off the pot, then put it on the table",
            [goal("put", "lid", "on", "table")],
        ),
        (
            "put the white mug on the left plate and put the yellow and white mug on the right one",
            [
                goal("put", "white mug", "on", "left plate"),
                goal("put", "yellow and white mug", "on", "right one"),
            ],
        ),
        (
            "turn on the stove and put the moka pot on it",
            [goal("turn on", "stove"), goal("put", "moka pot", "on", "stove")],
        ),
        ("open the drawer and close it", [goal("open", "drawer"), goal("close", "drawer")]),
        # Not understood: the whole phrase.
        ("the robot dances on the table", [goal("", "robot dances on the table")]),
        ("put it in the bowl", [goal("put", "", "in", "bowl")]),
        ("", []),
        (" . ", []),
    ],
)
def test_instructions(instruction: str, goals: list[Goal]) -> None:
    assert list(parse_instruction(instruction)) == goals
