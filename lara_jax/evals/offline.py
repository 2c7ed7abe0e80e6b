"""Held-out action error, against two baselines that have learnt next to nothing.

    mean action       always the training set's mean action
    previous action   the action executed just before, held for the whole chunk

A policy that does not beat both has not learnt to act from what it sees. One that does may still
fail in closed loop, which only `rollout` tells. Actions are physical (un-normalised), 7-D:
dx dy dz (m) droll dpitch dyaw (rad) gripper (above 0.5 open).

Axis letters: N samples, C action chunk, A = 7 action.
"""

from dataclasses import dataclass

import numpy as np

ACTION_DIM = 7
POSITION, ROTATION, GRIPPER = slice(0, 3), slice(3, 6), 6


@dataclass(frozen=True, kw_only=True)
class ActionError:
    """How far actions are from the demonstrated ones.

    Attributes:
      position_m: mean absolute error of dx, dy, dz.
      rotation_rad: mean absolute error of droll, dpitch, dyaw.
      gripper_accuracy: share of steps in which the gripper is rightly open or closed, in [0, 1].
    """

    position_m: float
    rotation_rad: float
    gripper_accuracy: float


def action_error(predicted: np.ndarray, target: np.ndarray, mask: np.ndarray) -> ActionError:
    """Error over all valid steps of all chunks.

    Args:
      predicted, target: float[N, C, 7].
      mask: bool[N, C], True where the target lies inside its episode.

    Returns:
      The three errors.

    Raises:
      ValueError: the shapes differ, or no step is valid.
    """
    if target.ndim != 3 or target.shape[-1] != ACTION_DIM or predicted.shape != target.shape:
        raise ValueError(
            f"predicted and target have shape [N, C, {ACTION_DIM}], "
            f"got {predicted.shape} and {target.shape}"
        )
    if mask.shape != target.shape[:2]:
        raise ValueError(f"mask has shape [N, C] = {target.shape[:2]}, got {mask.shape}")
    if not mask.any():
        raise ValueError("no step is valid: the mask is False everywhere")
    valid = mask.astype(bool)
    guess, truth = predicted[valid].astype(np.float64), target[valid].astype(np.float64)
    distance = np.abs(guess - truth)
    agree = (guess[:, GRIPPER] > 0.5) == (truth[:, GRIPPER] > 0.5)
    return ActionError(
        position_m=float(distance[:, POSITION].mean()),
        rotation_rad=float(distance[:, ROTATION].mean()),
        gripper_accuracy=float(agree.mean()),
    )


def compare(
    predicted: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    *,
    previous: np.ndarray,
    mean: np.ndarray,
) -> dict[str, ActionError]:
    """Error of a policy and of both baselines on the same steps.

    Args:
      predicted, target: float[N, C, 7].
      mask: bool[N, C], True where the target lies inside its episode.
      previous: float[N, 7], the action before each chunk (at an episode's start: no motion, open).
      mean: float[7], the training set's mean action.

    Returns:
      By name: "policy", "mean action", "previous action".

    Raises:
      ValueError: a shape is wrong, or no step is valid.
    """
    if previous.shape != (len(target), ACTION_DIM) or mean.shape != (ACTION_DIM,):
        raise ValueError(
            f"previous has shape ({len(target)}, {ACTION_DIM}) and mean ({ACTION_DIM},), "
            f"got {previous.shape} and {mean.shape}"
        )
    held = np.broadcast_to(previous[:, None, :], target.shape)
    constant = np.broadcast_to(mean, target.shape)
    return {
        "policy": action_error(predicted, target, mask),
        "mean action": action_error(constant, target, mask),
        "previous action": action_error(held, target, mask),
    }
