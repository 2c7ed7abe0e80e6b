"""Row rules: which steps remain, what follows them, and rules that are none."""

import numpy as np
import pytest

from data_pipelines.oxe.rules import Rows, parse_rule


def made_rows(steps: int, *, action: int = 7, state: int = 8) -> Rows:
    random = np.random.default_rng(0)
    return Rows.of(
        random.normal(size=(steps, action)).astype(np.float32),
        random.normal(size=(steps, state)).astype(np.float32),
    )


def applied(rows: Rows, *rules: str) -> Rows:
    for rule in rules:
        rows = parse_rule(rule)(rows)
    return rows


@pytest.mark.parametrize(
    ("rules", "frame", "next_frame"),
    [
        ([], [0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 6]),
        (["drop_first"], [1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 6]),
        (["drop_first", "relabel(6)"], [1, 2, 3, 4, 5], [2, 3, 4, 5, 6]),
        (["every(3)"], [0, 3, 6], [3, 6, 6]),
        (["every(5)"], [0, 5], [5, 5]),
        (["every(1)"], [0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 6]),
        (["every(3)", "relabel(7)"], [0, 3], [3, 6]),
        (["drop_first", "every(3)"], [1, 4], [4, 4]),
    ],
)
def test_rows_and_the_frames_after_them(
    rules: list[str], frame: list[int], next_frame: list[int]
) -> None:
    rows = made_rows(7)
    got = applied(rows, *rules)
    np.testing.assert_array_equal(got.frame, np.array(frame, np.int32), strict=True)
    np.testing.assert_array_equal(got.next_frame, np.array(next_frame, np.int32), strict=True)
    np.testing.assert_array_equal(got.states, rows.states[frame])
    np.testing.assert_array_equal(got.actions[:, 7:], rows.actions[frame, 7:])


def test_relabel_takes_the_change_between_rows_that_remain() -> None:
    rows = made_rows(7)
    got = applied(rows, "every(3)", "relabel(2)")
    np.testing.assert_array_equal(
        got.actions[:, :2], rows.states[[3, 6], :2] - rows.states[[0, 3], :2]
    )
    np.testing.assert_array_equal(got.actions[:, 2:], rows.actions[[0, 3], 2:])


def robot_path(first: tuple[float, float], yaw: float) -> Rows:
    """Four steps of a robot that goes one unit along x each, from the second on as told."""
    position = np.array([[0, 0], first, [2, 0], [3, 0]])
    waypoint = np.full((4, 2), [3.0, 4.0])  # 5 long
    actions = np.concatenate([waypoint, position, np.full((4, 1), yaw)], axis=1)
    return Rows.of(actions.astype(np.float32), np.zeros((4, 3), np.float32))


@pytest.mark.parametrize(
    ("yaw", "direction"),
    [(0, [1, 0]), (np.pi / 2, [0, -1]), (np.pi, [-1, 0]), (np.pi / 4, [0.5**0.5, -(0.5**0.5)])],
)
def test_waypoints_are_in_the_robots_frame(yaw: float, direction: list[float]) -> None:
    got = applied(robot_path((1, 0), yaw), "waypoints(3)")
    # The first step is 1 long and its waypoint 5: three steps along x are 15.
    np.testing.assert_allclose(got.actions, [np.array(direction) * 15], atol=1e-5)
    np.testing.assert_array_equal(got.frame, [0])
    np.testing.assert_array_equal(got.next_frame, [3])


def test_waypoints_are_scaled_by_the_first_step_that_moves() -> None:
    # The robot stands still at first; then it goes 2 with a waypoint 5 long: a factor of 2.5.
    got = applied(robot_path((0, 0), 0), "waypoints(3)")
    np.testing.assert_allclose(got.actions, [[7.5, 0]], atol=1e-5)


def test_a_robot_that_never_moves_has_no_way() -> None:
    rows = Rows.of(np.ones((7, 5), np.float32), np.zeros((7, 3), np.float32))
    np.testing.assert_array_equal(applied(rows, "waypoints(3)").actions, np.zeros((2, 2)))


@pytest.mark.parametrize(
    "rule", ["", "relabel", "drop_first(1)", "every(0)", "every(x)", "every(-1)", "shuffle"]
)
def test_an_unknown_rule_lists_the_known_ones(rule: str) -> None:
    known = r"known: drop_first, every\(n\), relabel\(n\), waypoints\(n\)"
    with pytest.raises(ValueError, match=known):
        parse_rule(rule)
