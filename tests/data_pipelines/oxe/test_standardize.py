"""Every dataset of the registry on a hand-made episode of its own raw schema, and bad episodes."""

import re
import zlib
from typing import Any

import numpy as np
import pytest

from data_pipelines.oxe.registry import REGISTRY, spec_named
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.oxe.standardize import required_keys, standardize
from tests.data_pipelines.oxe.cases import BY_NAME, CASES, made_episode


def test_every_dataset_has_a_case() -> None:
    # What the columns of the LeRobot ones are is told by the data (`data_pipelines.lerobot`).
    names = set(REGISTRY) - {"bridge_lara", "libero_lara"}
    assert sorted(name for case in CASES for name in case.names) == sorted(names)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_dataset_comes_out_as_worked_out_by_hand(name: str) -> None:
    case, spec = BY_NAME[name], spec_named(name)
    numbers, raw = made_episode(case, seed=7)
    steps = len(raw[case.language])
    actions, states = case.action(numbers), case.state(numbers)
    frame, later = np.arange(steps), np.minimum(np.arange(steps) + 1, steps - 1)
    if case.rows is not None:
        actions, states, frame, later = case.rows(actions, states, numbers)
    got = standardize(spec, raw)
    assert (got.actions.dtype, got.states.dtype) == (np.float32, np.float32)
    assert (got.frame.dtype, got.next_frame.dtype) == (np.int32, np.int32)
    np.testing.assert_allclose(got.actions, actions, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.states, states, rtol=1e-6, atol=0)
    np.testing.assert_array_equal(got.frame, frame)
    np.testing.assert_array_equal(got.next_frame, later)
    assert got.instructions == tuple(f"push {step} à gauche" for step in frame)
    assert got.actions.shape[1] == spec.action_dim
    assert got.states.shape[1] == spec.state_dim


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("length", [0, 1, 2])
def test_an_episode_may_be_too_short_for_a_row(name: str, length: int) -> None:
    case, spec = BY_NAME[name], spec_named(name)
    raw = {key: values[:length] for key, values in made_episode(case, seed=1)[1].items()}
    got = standardize(spec, raw)
    rows = {(): length, ("every(5)",): min(length, 1)}.get(spec.rows, 0)
    assert got.actions.shape == (rows, spec.action_dim)
    assert got.states.shape == (rows, spec.state_dim)
    assert (len(got.frame), len(got.next_frame), len(got.instructions)) == (rows, rows, rows)


@pytest.mark.parametrize("name", BY_NAME)
def test_only_the_required_features_are_read(name: str) -> None:
    case, spec = BY_NAME[name], spec_named(name)
    assert set(required_keys(spec)) == {*case.schema, case.language}


def test_bridge_shows_the_frame_of_the_step_it_drops() -> None:
    raw = {
        "action": np.zeros((4, 7), np.float32),
        "observation/state": np.zeros((4, 7), np.float32),
        "language_instruction": [b""] * 4,
    }
    got = standardize(spec_named("bridge_orig"), raw)
    np.testing.assert_array_equal(got.frame, [1, 2])
    np.testing.assert_array_equal(got.next_frame, [2, 3])


def test_bridge_takes_angles_as_they_are() -> None:
    states = np.zeros((4, 7), np.float32)
    states[:, 5] = [0, 3.1, -3.1, 0]
    raw = {"action": np.zeros((4, 7), np.float32), "observation/state": states}
    got = standardize(spec_named("bridge_orig"), raw | {"language_instruction": [b""] * 4})
    np.testing.assert_allclose(got.actions[:, 5], [-6.2, 3.1], rtol=1e-6)


def made_spec(**changes: Any) -> DatasetSpec:
    fields: dict[str, Any] = {
        "control_hz": 5.0,
        "cameras": {},
        "roles": {},
        "action": ("action",),
        "state": ("state",),
        "state_modes": ("q99",) * 2,
    }
    return DatasetSpec(name="mine", **(fields | changes))


def made_raw(**changes: Any) -> dict[str, Any]:
    return {
        "action": np.ones((3, 7), np.float32),
        "state": np.ones((3, 2), np.float32),
        "language_instruction": [b"go"] * 3,
    } | changes


def test_a_set_may_have_no_language() -> None:
    raw = made_raw()
    del raw["language_instruction"]
    assert standardize(made_spec(language=""), raw).instructions == ("", "", "")


def test_a_step_of_several_axes_is_flattened() -> None:
    pose = np.arange(18, dtype=np.float64).reshape(3, 2, 3)
    got = standardize(made_spec(state=("state[4:]",)), made_raw(state=pose))
    np.testing.assert_array_equal(got.states, np.float32([[4, 5], [10, 11], [16, 17]]), strict=True)


BROKEN = np.ones((3, 2), np.float32)
BROKEN[1, 1] = np.nan
WIDE = {"state_modes": ("q99",) * 3}


@pytest.mark.parametrize(
    ("spec", "raw", "message"),
    [
        (
            {"state": ("pose", "grip")},
            {},
            "step feature(s) pose, grip missing; there are: action, language_instruction, state",
        ),
        ({}, {"state": np.ones((2, 2))}, "different lengths: {'action': 3, 'state': 2"),
        ({}, {"language_instruction": [b"go"] * 2}, "different lengths"),
        (
            {"state": ("state", "zeros(1)")},
            {},
            "the state terms give 3 columns, state_modes names 2 (left out, it is 8 times q99",
        ),
        ({}, {"action": np.ones((3, 8))}, "the action terms give 8 columns, action_modes names 7"),
        ({}, {"state": BROKEN}, "feature 'state' is not finite at step 1"),
        ({}, {"action": np.full((3, 7), 1e300)}, "feature 'action' is not finite at step 0"),
        ({"state": ("state[0:3]",)} | WIDE, {}, "term 'state[0:3]': the feature has 2 column(s)"),
        ({"state": ("state[-3:]",)} | WIDE, {}, "term 'state[-3:]': the feature has 2 column(s)"),
        (
            {"state": ("state[1:1]",), "state_modes": ()},
            {},
            "term 'state[1:1]': the feature has 2 column(s)",
        ),
        ({"state": ("state | euler",)} | WIDE, {}, "a quaternion has 4 columns, not 2"),
        ({}, {"state": [b"1"] * 3}, "feature 'state' holds byte strings, where 'state' is used"),
        ({}, {"state": np.array([["a"]] * 3)}, "feature 'state' holds <U1"),
        ({"state": ("state | zlib(2)",)}, {}, "the feature holds float32, not bytes"),
        (
            {"state": ("state | zlib(2)",)},
            {"state": [b"junk"] * 3},
            "term 'state | zlib(2)', step 0: Error -3",
        ),
        (
            {"state": ("state | zlib(2)",)},
            {"state": [zlib.compress(bytes(4))] * 3},
            "step 0: 4 bytes, not 2 float32 numbers",
        ),
        (
            {},
            {"language_instruction": [b"go", b"\xff", b"go"]},
            "feature 'language_instruction', step 1: no text",
        ),
        (
            {},
            {"language_instruction": np.zeros((3, 4), np.int32)},
            "holds numbers (int32), not text; code points are read by",
        ),
        (
            {"language": "language_instruction | code_points"},
            {},
            "feature 'language_instruction' holds no code points",
        ),
        (
            {"language": "state | code_points"},
            {"state": np.array([[65, 0], [0, 0], [0xD800, 0]])},
            "feature 'state', step 2: no text",
        ),
        ({"rows": ("relabel(3)",)}, {}, "relabel(3): the action is 7 wide, the state 2"),
        ({"rows": ("waypoints(3)",)}, {}, "waypoints(3) needs the action terms"),
    ],
)
def test_a_bad_episode_is_refused(spec: dict[str, Any], raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        standardize(made_spec(**spec), made_raw(**raw))
    assert str(error.value).startswith("dataset 'mine': ")
