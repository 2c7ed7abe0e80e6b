"""Held-out action error: hand-computed numbers, masks, both baselines, phases of the task."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipelines.index.build import build_index
from data_pipelines.index.format import Index
from data_pipelines.make_tabletop import CollectConfig, make_dataset
from data_pipelines.sampling import StepSource
from lara_jax.evals import demonstrations
from lara_jax.evals.demonstrations import Demonstrated, demonstrated
from lara_jax.evals.offline import action_error, compare
from lara_jax.evals.tabletop import TabletopConfig


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


def test_errors_are_told_by_phase() -> None:
    target = np.concatenate([chunks([[0.0, 0.0, 1.0]]), chunks([[0.0, 0.0, 0.0]])] * 2)
    predicted = target.copy()
    predicted[1, :, :3] = 0.04
    predicted[3, :, 3:6] = 0.2
    predicted[2, :, 6] = 0
    found = Demonstrated(
        predicted=predicted,
        target=target,
        mask=np.ones((4, 1), bool),
        previous=target[:, 0],
        phases=("move", "grasp", "move", "grasp"),
    )
    errors = found.errors(np.full(7, 0.5))
    assert list(errors) == ["move", "grasp", "all"]
    assert errors["move"]["policy"].gripper_accuracy == 0.5
    assert errors["grasp"]["policy"].position_m == pytest.approx(0.02)
    assert errors["grasp"]["policy"].rotation_rad == pytest.approx(0.1)
    assert errors["all"]["policy"].position_m == pytest.approx(0.01)
    assert errors["move"]["previous action"].gripper_accuracy == 1
    (first, *_, last) = found.lines(np.full(7, 0.5))
    assert (first["phase"], first["samples"], last["phase"], last["samples"]) == (
        "move",
        2,
        "all",
        4,
    )
    assert first["mean_action_position_m"] == 0.5 and first["previous_action_position_m"] == 0
    table = demonstrations.phase_table(
        [{"dataset": "d", **line} for line in found.lines(np.full(7, 0.5))]
    )
    assert table.splitlines()[3].split()[:5] == ["d", "grasp", "2", "20", "500"]


@pytest.mark.parametrize(
    ("subtask", "expected"),
    [("Lower to the red block.", "lower"), ("Retreat.", "retreat"), ("", "")],
)
def test_a_subtasks_verb(subtask: str, expected: str) -> None:
    assert demonstrations.verb(subtask) == expected


def test_rare_phases_are_put_together() -> None:
    many = [f"verb {n}" for n in range(20) for _ in range(30 - n)]
    few = demonstrations.few(many)
    assert set(few) == {f"verb {n}" for n in range(demonstrations.MOST_PHASES)} | {"other"}
    assert few.index("other") == many.index(f"verb {demonstrations.MOST_PHASES}")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """One held-out tabletop episode."""
    pytest.importorskip("mujoco")
    config = CollectConfig(tabletop=TabletopConfig(image_size_px=16), disturb_probability=0.0)
    summary = make_dataset(tmp_path_factory.mktemp("data"), config, episodes=1, val_episodes=1)
    return build_index(summary.path, "val")


def steps(index: Index, **changes: Any) -> StepSource:
    return StepSource(**{"index": index, "views": ("primary",), "action_horizon": 4} | changes)


def still(observations: Sequence[Any]) -> np.ndarray:
    return np.tile(demonstrations.NO_MOTION_OPEN, (len(observations), 4, 1))


def test_the_tabletops_phases_are_the_experts(index: Index) -> None:
    found = demonstrated(still, steps(index), rows=4)
    phases = list(dict.fromkeys(found.phases))
    assert phases == ["move", "lower", "grasp", "lift", "release", "retreat"]
    errors = found.errors(np.zeros(7))
    # Holding still is right where the expert waits for the fingers, and wrong where it moves.
    assert errors["move"]["policy"].position_m > errors["grasp"]["policy"].position_m
    assert errors["retreat"]["policy"].gripper_accuracy == 1
    assert errors["all"]["policy"].gripper_accuracy < 1


def test_without_annotations_the_gripper_tells_the_phase(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demonstrations, "verb", lambda subtask: "")
    phases = demonstrated(still, steps(index), rows=4).phases
    assert list(dict.fromkeys(phases)) == ["before the grasp", "holding", "after"]
    closed = index.actions[:, 6] < 0.5
    assert [phase == "holding" for phase in phases] == closed.tolist()


def test_the_action_before_is_as_long_as_those_of_the_chunk(index: Index) -> None:
    source = steps(index, chunk_hz=index.spec.control_hz / 2)
    assert source.stride == 2
    np.testing.assert_array_equal(demonstrations.previous_action(source, 1), [0] * 6 + [1])
    joined = index.actions[3:5].sum(axis=0)
    joined[6] = index.actions[4, 6]
    np.testing.assert_allclose(demonstrations.previous_action(source, 5), joined, rtol=1e-6)


def test_views_that_are_not_there_are_none(index: Index) -> None:
    asked: list[Any] = []

    def policy(observations: Sequence[Any]) -> np.ndarray:
        asked.extend(observations)
        return still(observations)

    demonstrated(policy, steps(index, views=("primary", "primary@-2")), samples=1, rows=2)
    assert [seen["primary@-2"] for seen in asked] == [None, None]
    assert asked[0]["primary"].shape == (16, 16, 3)


def test_other_actions_and_empty_splits_are_refused(index: Index) -> None:
    with pytest.raises(ValueError, match="no step"):
        demonstrated(still, steps(index, episodes=slice(0, 0)))
    joints: Any = SimpleNamespace(
        name="arms", index=SimpleNamespace(spec=SimpleNamespace(action_encoding="JOINT_POS"))
    )
    with pytest.raises(ValueError, match=r"'arms' has JOINT_POS actions.*EEF_POS"):
        demonstrated(still, joints)
