"""Scripted expert of the tabletop, and the reasoning behind each of its actions.

The expert has no memory: it looks at the true state of the scene and decides what to do next. So
it recovers from disturbances, and equal states get equal actions, which is what a policy without
memory can learn. It makes the moves of the task in turn: the one whose block it holds, else the
first that is not done. The subtasks of a move::

    move to the block -> lower to the block -> grasp -> lift
    -> move to the target -> lower onto the target -> release

and in the end "retreat". Each has a waypoint for the gripper; the action is the way there, clipped
along each axis.

Motion text, from the vector (waypoint - gripper): "Move ", then forward or backward (x) and left
or right (y), then up or down (z), naming a direction only if its part exceeds 1 cm. With nothing
to name, "Close the gripper." or "Open the gripper." if the gripper's command changes, else
"Hold still.".
"""

from dataclasses import dataclass

import numpy as np

from lara_jax.evals.tabletop.environment import RELEASED_OPENING, TabletopEnv
from lara_jax.evals.tabletop.scene import FINGER_TRAVEL_M
from lara_jax.evals.tabletop.tasks import Move, words

SPEED_M, TURN_RAD = 0.035, 0.2  # most that one action moves along an axis, and turns
TRAVEL_HEIGHT_M = 0.10  # of the gripper above the table when it moves sideways
LOWEST_TRAVEL_M = 0.07  # below this it goes straight up first
RETREAT_HEIGHT_M = 0.09
FUNNEL_M = 0.022  # sideways distance under which the gripper goes down, correcting its way
LOWER_WITHIN_RAD = 0.4  # ... and so does the angle to the block's sides
ROOM_M = 0.035  # of a finger beside a block to the middle of another block
REACHED_M = 0.008
HELD_M = 0.015  # a held block's centre is so close to the TCP
ON_PLATE_M, ON_BLOCK_M = 0.03, 0.008  # a block so close to its target's middle may be let go
HOVER_M = 0.02  # so high above its place a block is brought into line with the block below
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
      boxes: float32[2, 4], the present move's block and target in the primary image; NaN where
        hidden.
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
    move = _present_move(env)
    plan = _plan(env, move)
    way = plan.waypoint - env.tcp_m
    turn = np.clip(plan.turn_rad, -TURN_RAD, TURN_RAD)
    action = np.array([*np.clip(way, -SPEED_M, SPEED_M), 0, 0, turn, plan.gripper], np.float32)
    return ExpertStep(
        action=action,
        subtask=plan.subtask,
        motion=motion_text(way, plan.gripper - env.gripper_command),
        boxes=env.boxes(move.block, move.target),
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
    directions = (("forward", "backward"), ("left", "right"), ("up", "down"))
    named = [
        (plus if part > 0 else minus) if abs(part) > NAMED_M else ""
        for (plus, minus), part in zip(directions, way_m, strict=True)
    ]
    sideways = " and ".join(filter(None, named[:2]))
    moves = ", then ".join(filter(None, (sideways, named[2])))
    if moves:
        return f"Move {moves}."
    if gripper_change:
        return "Open the gripper." if gripper_change > 0 else "Close the gripper."
    return "Hold still."


def _present_move(env: TabletopEnv) -> Move:
    """The move whose block is in the gripper, else the first that is not done, else the last."""
    held = (move for move in env.moves if _in_gripper(env, move.block))
    waiting = (move for move in env.moves if not env.placed(move))
    return next(held, next(waiting, env.moves[-1]))


def _plan(env: TabletopEnv, move: Move) -> _Plan:
    tcp, block, target = env.tcp_m, env.centre_m(move.block), env.top_m(move.target)
    if env.success:
        return _Plan(
            subtask="retreat",
            waypoint=np.array([*tcp[:2], TRAVEL_HEIGHT_M]),
            gripper=1,
            done=bool(tcp[2] > RETREAT_HEIGHT_M),
        )
    above_rest = block[2] - target[2] - env.config.block_half_m
    near = _sideways(block, target) < (ON_PLATE_M if env.is_plate(move.target) else ON_BLOCK_M)
    if near and abs(above_rest) < LET_GO_HEIGHT_M:
        return _Plan(subtask=f"release the {words(move.block)}", waypoint=tcp, gripper=1)
    if _holds(env, move.block):
        return _carry(env, move)
    return _fetch(env, move)


def _fetch(env: TabletopEnv, move: Move) -> _Plan:
    """From anywhere to the block between the closed fingers."""
    tcp, block, name = env.tcp_m, env.centre_m(move.block), words(move.block)
    turn = _grasp_yaw(env, move.block) - env.yaw_rad
    if np.linalg.norm(block - tcp) < (REACHED_M if env.gripper_command > 0.5 else HELD_M):
        return _Plan(subtask=f"grasp the {name}", waypoint=block, gripper=0)
    if _sideways(tcp, block) < FUNNEL_M and abs(turn) < LOWER_WITHIN_RAD:
        subtask, waypoint = f"lower to the {name}", block
    else:
        subtask, waypoint = f"move to the {name}", _travel(tcp, block)
    return _Plan(subtask=subtask, waypoint=waypoint, turn_rad=turn, gripper=1)


def _grasp_yaw(env: TabletopEnv, block: str) -> float:
    """The nearest turn of the fingers to a block's sides that has room for them, in rad."""
    quarter = np.pi / 2  # a cube looks the same after a quarter turn
    nearest = (env.block_yaw_rad(block) + quarter / 2) % quarter - quarter / 2
    turns = (nearest, nearest - np.copysign(quarter, nearest))
    others = [env.centre_m(other) for other in env.block_names if other != block]

    def has_room(yaw: float) -> bool:
        along = FINGER_TRAVEL_M * np.array([-np.sin(yaw), np.cos(yaw), 0])
        fingers = (env.centre_m(block) + along, env.centre_m(block) - along)
        return all(_sideways(finger, other) > ROOM_M for finger in fingers for other in others)

    return next(filter(has_room, turns), nearest)


def _carry(env: TabletopEnv, move: Move) -> _Plan:
    """From the held block to the block on its target."""
    tcp, block, target = env.tcp_m, env.centre_m(move.block), env.top_m(move.target)
    goal = target + (0, 0, env.config.block_half_m) + (tcp - block)
    if not env.is_plate(move.target) and _sideways(block, target) > ON_BLOCK_M:
        goal[2] += HOVER_M  # a block touched from the side would tip over
    if _sideways(block, target) < FUNNEL_M:
        subtask, waypoint = f"lower onto the {words(move.target)}", goal
    else:
        waypoint = _travel(tcp, goal)
        lifting = _sideways(waypoint, tcp) == 0
        lift, go = f"lift the {words(move.block)}", f"move to the {words(move.target)}"
        subtask = lift if lifting else go
    return _Plan(subtask=subtask, waypoint=waypoint, gripper=0)


def _travel(tcp: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Waypoint above the goal; straight up first where the gripper is too low to move sideways."""
    column = goal if tcp[2] > LOWEST_TRAVEL_M else tcp
    return np.array([*column[:2], TRAVEL_HEIGHT_M])


def _in_gripper(env: TabletopEnv, block: str) -> bool:
    """True if the block is between fingers that are not wide open."""
    near = np.linalg.norm(env.centre_m(block) - env.tcp_m) < HELD_M
    return bool(near and env.gripper_opening < RELEASED_OPENING)


def _holds(env: TabletopEnv, block: str) -> bool:
    """True if the fingers have closed on the block."""
    held_opening = env.config.block_half_m / FINGER_TRAVEL_M
    return bool(
        env.gripper_command < 0.5
        and np.linalg.norm(env.centre_m(block) - env.tcp_m) < HELD_M
        and env.gripper_opening < held_opening + HELD_SLACK
    )


def _sideways(one: np.ndarray, other: np.ndarray) -> float:
    """Horizontal distance in m."""
    return float(np.hypot(*(one - other)[:2]))
