"""Scripted expert of the tabletop, and the reasoning behind each of its actions.

The expert has no memory: it looks at the true state of the scene and decides what to do next. So
it recovers from disturbances, and equal states get equal actions, which is what a policy without
memory can learn. Subtasks::

    move to the block -> lower to the block -> grasp -> lift
    -> move to the plate -> lower onto the plate -> release -> retreat

Each has a waypoint for the gripper; the action is the way there, clipped along each axis.

Motion text, from the vector (waypoint - gripper): "Move ", then forward or backward (x) and left
or right (y), then up or down (z), naming a direction only if its part exceeds 1 cm. With nothing
to name, "Close the gripper." or "Open the gripper." if the gripper's command changes, else
"Hold still.".
"""

from dataclasses import dataclass

import numpy as np

from lara_jax.evals.tabletop.environment import TabletopEnv
from lara_jax.evals.tabletop.scene import FINGER_TRAVEL_M

SPEED_M, TURN_RAD = 0.035, 0.2  # most that one action moves along an axis, and turns
TRAVEL_HEIGHT_M = 0.10  # of the gripper above the table when it moves sideways
LOWEST_TRAVEL_M = 0.07  # below this it goes straight up first
RETREAT_HEIGHT_M = 0.09
FUNNEL_M = 0.022  # sideways distance under which the gripper goes down, correcting its way
REACHED_M = 0.008
HELD_M = 0.015  # a held block's centre is so close to the TCP
ON_PLATE_M = 0.03  # a block so close to the middle of the plate may be let go
LET_GO_HEIGHT_M = 0.004  # ... and so close to its resting height
HELD_SLACK = 0.06  # in gripper opening
NAMED_M = 0.01


@dataclass(frozen=True, kw_only=True)
class ExpertStep:
    """What the expert does now, and why.

    Attributes:
      action: float32[7], for `TabletopEnv.step`.
      subtask: as "lower to the red block".
      motion: as "Move forward and left, then down.".
      boxes: float32[2, 4], the block and the plate in the present image; NaN where hidden.
      done: True where the task is solved and the gripper is out of the way.
    """

    action: np.ndarray
    subtask: str
    motion: str
    boxes: np.ndarray
    done: bool


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One subtask: where the TCP shall go (m, rad), what the gripper does (1 open, 0 closed)."""

    subtask: str
    waypoint: np.ndarray
    turn_rad: float = 0.0
    gripper: float
    done: bool = False


def expert_step(env: TabletopEnv) -> ExpertStep:
    """The expert's action and reasoning in the present state of a tabletop that was reset."""
    plan = _plan(env)
    way = plan.waypoint - env.tcp_m
    turn = np.clip(plan.turn_rad, -TURN_RAD, TURN_RAD)
    action = np.array([*np.clip(way, -SPEED_M, SPEED_M), 0, 0, turn, plan.gripper], np.float32)
    return ExpertStep(
        action=action,
        subtask=plan.subtask,
        motion=motion_text(way, plan.gripper - env.gripper_command),
        boxes=env.boxes(),
        done=plan.done,
    )


def motion_text(way_m: np.ndarray, gripper_change: float) -> str:
    """An intended motion in words (rule in the module docstring).

    Args:
      way_m: float[3], from the gripper to its waypoint.
      gripper_change: +1 opens, -1 closes, 0 stays.

    Returns:
      `([0.05, 0.03, -0.1], 0)` -> "Move forward and left, then down."
    """
    words = (("forward", "backward"), ("left", "right"), ("up", "down"))
    named = [
        (plus if part > 0 else minus) if abs(part) > NAMED_M else ""
        for (plus, minus), part in zip(words, way_m, strict=True)
    ]
    sideways = " and ".join(filter(None, named[:2]))
    moves = ", then ".join(filter(None, (sideways, named[2])))
    if moves:
        return f"Move {moves}."
    if gripper_change:
        return "Open the gripper." if gripper_change > 0 else "Close the gripper."
    return "Hold still."


def _plan(env: TabletopEnv) -> _Plan:
    tcp, block, plate = env.tcp_m, env.block_m, env.plate_m
    if env.success:
        return _Plan(
            subtask="retreat",
            waypoint=np.array([*tcp[:2], TRAVEL_HEIGHT_M]),
            gripper=1,
            done=bool(tcp[2] > RETREAT_HEIGHT_M),
        )
    above_rest = block[2] - plate[2] - env.config.block_half_m
    if _sideways(block, plate) < ON_PLATE_M and abs(above_rest) < LET_GO_HEIGHT_M:
        return _Plan(subtask=f"release the {env.block} block", waypoint=tcp, gripper=1)
    if _holds(env):
        return _carry(env)
    return _fetch(env)


def _fetch(env: TabletopEnv) -> _Plan:
    """From anywhere to the block between the closed fingers."""
    tcp, block = env.tcp_m, env.block_m
    quarter = np.pi / 2  # a cube looks the same after a quarter turn: take the nearest
    grasp_yaw = (env.block_yaw_rad + quarter / 2) % quarter - quarter / 2
    turn = grasp_yaw - env.yaw_rad
    far = _sideways(tcp, block)
    if np.linalg.norm(block - tcp) < (REACHED_M if env.gripper_command > 0.5 else HELD_M):
        return _Plan(subtask=f"grasp the {env.block} block", waypoint=block, gripper=0)
    if far < FUNNEL_M:
        subtask, waypoint = f"lower to the {env.block} block", block
    else:
        subtask, waypoint = f"move to the {env.block} block", _travel(tcp, block)
    return _Plan(subtask=subtask, waypoint=waypoint, turn_rad=turn, gripper=1)


def _carry(env: TabletopEnv) -> _Plan:
    """From the held block to the block on the plate."""
    tcp, block, plate = env.tcp_m, env.block_m, env.plate_m
    goal = plate + (0, 0, env.config.block_half_m) + (tcp - block)
    if _sideways(block, plate) < FUNNEL_M:
        subtask, waypoint = f"lower onto the {env.plate} plate", goal
    else:
        waypoint = _travel(tcp, goal)
        lifting = _sideways(waypoint, tcp) == 0
        subtask = f"lift the {env.block} block" if lifting else f"move to the {env.plate} plate"
    return _Plan(subtask=subtask, waypoint=waypoint, gripper=0)


def _travel(tcp: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Waypoint above the goal; straight up first where the gripper is too low to move sideways."""
    column = goal if tcp[2] > LOWEST_TRAVEL_M else tcp
    return np.array([*column[:2], TRAVEL_HEIGHT_M])


def _holds(env: TabletopEnv) -> bool:
    """True if the fingers have closed on the block."""
    held_opening = env.config.block_half_m / FINGER_TRAVEL_M
    return bool(
        env.gripper_command < 0.5
        and np.linalg.norm(env.block_m - env.tcp_m) < HELD_M
        and env.gripper_opening < held_opening + HELD_SLACK
    )


def _sideways(one: np.ndarray, other: np.ndarray) -> float:
    """Horizontal distance in m."""
    return float(np.hypot(*(one - other)[:2]))
