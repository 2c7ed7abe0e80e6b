"""The few rules that the datasets share, written out step by step in plain NumPy."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np

Raw = Mapping[str, np.ndarray]
STATE = "observation/state"
NATURAL = "observation/natural_language_instruction"
CLOSEDNESS = "action/gripper_closedness_action"


def side_by_side(*columns: np.ndarray) -> np.ndarray:
    """Columns next to each other; float32[T] counts as one column."""
    return np.concatenate([c[:, None] if c.ndim == 1 else c for c in columns], axis=1)


def zeros(like: np.ndarray, width: int) -> np.ndarray:
    return np.zeros((len(like), width), np.float32)


def looked_ahead(positions: np.ndarray) -> np.ndarray:
    """The gripper made binary, by a loop from the end."""
    result, ahead = np.empty_like(positions), positions[-1]
    for step in reversed(range(len(positions))):
        if positions[step] > 0.95:
            ahead = 1.0
        elif positions[step] < 0.05:
            ahead = 0.0
        result[step] = ahead
    return result


def made_absolute(commands: np.ndarray) -> np.ndarray:
    """Where the gripper is after each command, by a loop from the start."""
    codes = [-1 if c > 0.1 else 1 if c < -0.1 else 0 for c in commands]
    state = next((-code for code in codes if code), 1)
    result = []
    for code in codes:
        state = code or state
        result.append(state / 2 + 0.5)
    return np.array(result, np.float32)


def euler_angles(quaternions: np.ndarray) -> np.ndarray:
    """x, y, z, w to angles about x, y, z, one by one and in double precision."""
    angles = []
    for x, y, z, w in quaternions.astype(np.float64):
        angles.append(
            [
                np.arctan2(2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
                np.arcsin(2 * (y * w - x * z)),
                np.arctan2(2 * (x * y + z * w), 1 - 2 * (y * y + z * z)),
            ]
        )
    return np.array(angles, np.float32)


def inverted(x: np.ndarray) -> np.ndarray:
    return 1 - x


def clipped(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, 0), 1)


def motion(r: Raw) -> np.ndarray:
    return side_by_side(r["action/world_vector"], r["action/rotation_delta"])


def pose_pad_gripper(feature: str) -> Callable[[Raw], np.ndarray]:
    return lambda r: side_by_side(r[feature][:, :6], zeros(r[feature], 1), r[feature][:, -1])


def no_state(r: Raw) -> np.ndarray:
    return zeros(next(iter(r.values())), 8)


def bridge_rows(
    actions: np.ndarray, states: np.ndarray, r: Raw
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    steps = range(1, len(actions) - 1)
    changes = [r[STATE][t + 1, :6] - r[STATE][t, :6] for t in steps]
    moved = side_by_side(np.array(changes), actions[1:-1, 6])
    return moved, states[1:-1], np.array(steps), np.array(steps) + 1


def aloha_rows(
    actions: np.ndarray, states: np.ndarray, r: Raw
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    frame = np.arange(0, len(actions), 5)
    return actions[frame], states[frame], frame, np.array([*frame[1:], frame[-1]])


def rpt_rows(
    actions: np.ndarray, states: np.ndarray, r: Raw
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    frame = np.arange(0, len(actions), 3)
    joints = r["observation/joint_pos"][frame]
    moved = side_by_side(joints[1:] - joints[:-1], actions[frame[:-1], 7])
    return moved, states[frame[:-1]], frame[:-1], frame[1:]


def gnm_rows(
    actions: np.ndarray, states: np.ndarray, r: Raw
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    position, yaw = r["observation/position"], r["observation/yaw"][:, 0]
    scale = np.linalg.norm(r["action"][0]) / np.linalg.norm(position[1] - position[0])
    frame = np.arange(0, len(position), 3)
    ways = []
    for now, later in pairwise(frame):
        rotation = np.array(
            [[np.cos(yaw[now]), -np.sin(yaw[now])], [np.sin(yaw[now]), np.cos(yaw[now])]]
        )
        ways.append((position[later] - position[now]) @ rotation * scale)
    return np.array(ways, np.float32), states[frame[:-1]], frame[:-1], frame[1:]
