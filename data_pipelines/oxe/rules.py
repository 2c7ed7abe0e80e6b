"""Row rules: what happens to an episode as a whole, once its vectors are made.

A rule takes and gives rows: an action, a state, the stored step they come from and the one whose
image comes next. Rules are named in a spec, in order, with a number where they need one::

    ["drop_first", "relabel(6)"]        Bridge

    stored step     0    1    2    3         the first action is empty
    drop_first           1    2    3
    relabel(6)           1    2              action[:6] = state[t+1][:6] - state[t][:6]
    next step            2    3              a step that is no row still is the next image

    ["every(5)"]                        ALOHA, 50 Hz to 10 Hz: rows 0, 5, 10, each next to the other
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """N steps of an episode: float32[N, A], float32[N, J], int32[N], int32[N]."""

    actions: np.ndarray
    states: np.ndarray
    frame: np.ndarray
    next_frame: np.ndarray

    @classmethod
    def of(cls, actions: np.ndarray, states: np.ndarray) -> "Rows":
        """A row for each stored step, the next image one step later (at the end, the same)."""
        frame = np.arange(len(actions), dtype=np.int32)
        return cls(
            actions=actions, states=states, frame=frame, next_frame=np.append(frame[1:], frame[-1:])
        )

    def take(self, rows: slice) -> "Rows":
        """Some of the rows."""
        return Rows(
            actions=self.actions[rows],
            states=self.states[rows],
            frame=self.frame[rows],
            next_frame=self.next_frame[rows],
        )


Rule = Callable[[Rows], Rows]


def drop_first(rows: Rows) -> Rows:
    """Leaves out the first row."""
    return rows.take(slice(1, None))


def every(rows: Rows, n: int) -> Rows:
    """Keeps one row of n; the next image is that of the next row kept."""
    kept = rows.take(slice(None, None, n))
    return replace(kept, next_frame=np.append(kept.frame[1:], kept.frame[-1:]))


def relabel(rows: Rows, n: int) -> Rows:
    """Makes the first n action dimensions the change to the next state; the last row goes.

    Plain differences, as OpenVLA and Octo take them: an angle that wraps around makes a jump.

    Source: OpenVLA c8f03f4, prismatic/vla/datasets/rlds/utils/data_utils.py,
    relabel_bridge_actions.
    """
    widths = rows.actions.shape[1], rows.states.shape[1]
    if n > min(widths):
        raise ValueError(f"relabel({n}): the action is {widths[0]} wide, the state {widths[1]}")
    changes = np.diff(rows.states[:, :n], axis=0)
    actions = np.concatenate([changes, rows.actions[:-1, n:]], axis=1)
    return replace(rows.take(slice(None, -1)), actions=actions)


def waypoints(rows: Rows, n: int) -> Rows:
    """Makes [waypoint dx dy | position x y | yaw] the robot's own path, one row of n.

    The raw waypoints are scaled by a factor of each robot; it is the length of the first waypoint
    over that of the way moved (Octo takes the first step; here the first that moves at all). The
    new action is the way to the next kept position, turned into the robot's frame, times that
    factor; the last row goes.

    Source: Octo 241fb35, octo/data/oxe/oxe_standardization_transforms.py, gnm_dataset_transform.
    """
    if rows.actions.shape[1] != 5:
        raise ValueError(
            f"waypoints({n}) needs the action terms [dx dy, x y, yaw], 5 columns; "
            f"there are {rows.actions.shape[1]}"
        )
    ways = np.linalg.norm(np.diff(rows.actions[:, 2:4], axis=0), axis=1)
    moving = np.flatnonzero(ways)[:1]
    lengths = np.linalg.norm(rows.actions[moving, :2], axis=1)
    scale = (lengths / ways[moving]).sum(dtype=np.float32)  # one number, or 0 if nothing moves
    kept = every(rows, n)
    yaw = kept.actions[:-1, 4]
    dx, dy = np.diff(kept.actions[:, 2:4], axis=0).T
    ahead = dx * np.cos(yaw) + dy * np.sin(yaw)
    left = dy * np.cos(yaw) - dx * np.sin(yaw)
    return replace(kept.take(slice(None, -1)), actions=np.stack([ahead, left], axis=1) * scale)


# With each rule, whether it is written with a number.
RULES: Mapping[str, tuple[Callable[..., Rows], bool]] = {
    "drop_first": (drop_first, False),
    "every": (every, True),
    "relabel": (relabel, True),
    "waypoints": (waypoints, True),
}
_RULE = re.compile(r"(\w+)(?:\((\d+)\))?")


@cache
def parse_rule(text: str) -> Rule:
    """Reads a rule, such as "drop_first" or "every(3)".

    Raises:
      ValueError: unknown, or without its number; the message lists the known rules.
    """
    found = _RULE.fullmatch(text.strip())
    name, number = (found[1], found[2]) if found else (text, None)
    if name not in RULES or RULES[name][1] != (number is not None) or number == "0":
        known = ", ".join(
            f"{rule}(n)" if numbered else rule for rule, (_, numbered) in RULES.items()
        )
        raise ValueError(f"unknown row rule {text!r}; known: {known}, with n of at least 1")
    function = RULES[name][0]
    return function if number is None else lambda rows: function(rows, int(number))
