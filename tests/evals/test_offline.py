"""Held-out action error: hand-computed numbers, masks and both baselines."""

import numpy as np
import pytest

from lara_jax.evals.offline import action_error, compare


def chunks(rows: list[list[float]]) -> np.ndarray:
    """float32[1, len(rows), 7]: position x 3, rotation x 3, gripper of each step."""
    return np.array([[[p] * 3 + [r] * 3 + [g] for p, r, g in rows]], np.float32)


def test_error_of_each_group_over_valid_steps() -> None:
    predicted = chunks([[0.01, 0.2, 0.9], [0.03, 0.0, 0.4], [9.0, 9.0, 0.0]])
    target = chunks([[0.00, 0.0, 1.0], [0.00, 0.0, 1.0], [0.0, 0.0, 1.0]])
    error = action_error(predicted, target, np.array([[True, True, False]]))
    assert error.position_m == pytest.approx(0.02)
    assert error.rotation_rad == pytest.approx(0.1)
    assert error.gripper_accuracy == 0.5


def test_baselines_hold_the_previous_and_the_mean_action() -> None:
    target = chunks([[0.02, 0.1, 0.0], [0.04, 0.1, 0.0]])
    mask = np.ones((1, 2), bool)
    previous = chunks([[0.02, 0.0, 0.0]])[:, 0]
    mean = chunks([[0.03, 0.1, 0.7]])[0, 0]
    errors = compare(target, target, mask, previous=previous, mean=mean)
    assert list(errors) == ["policy", "mean action", "previous action"]
    assert errors["policy"].position_m == 0 and errors["policy"].gripper_accuracy == 1
    assert errors["mean action"].position_m == pytest.approx(0.01)
    assert errors["mean action"].rotation_rad == pytest.approx(0)
    assert errors["mean action"].gripper_accuracy == 0
    assert errors["previous action"].position_m == pytest.approx(0.01)
    assert errors["previous action"].rotation_rad == pytest.approx(0.1)
    assert errors["previous action"].gripper_accuracy == 1


def test_wrong_shapes_and_empty_masks_raise() -> None:
    target, mask = np.zeros((2, 4, 7)), np.ones((2, 4), bool)
    with pytest.raises(ValueError, match="predicted"):
        action_error(target[:, :3], target, mask)
    with pytest.raises(ValueError, match="7"):
        action_error(target[..., :6], target[..., :6], mask)
    with pytest.raises(ValueError, match="mask"):
        action_error(target, target, mask[:1])
    with pytest.raises(ValueError, match="False everywhere"):
        action_error(target, target, ~mask)
    with pytest.raises(ValueError, match="previous"):
        compare(target, target, mask, previous=np.zeros((1, 7)), mean=np.zeros(7))
