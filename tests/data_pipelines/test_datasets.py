"""The registry and the rules that bring raw steps into the common form."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.datasets import REGISTRY, binarize_gripper, spec_named, standardize
from lara_jax.transforms import MODES


def test_an_unknown_dataset_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'kitchen'; known: bridge_dataset, lara_tabletop"):
        spec_named("kitchen")


def test_an_unknown_view_lists_the_views() -> None:
    spec = spec_named("bridge_dataset")
    assert spec.camera_keys(("image_2",)) == ("steps/observation/image_2",)
    for views in (("image_0", "wrist"), ()):
        with pytest.raises(ValueError, match="it has: image_0, image_1, image_2, image_3"):
            spec.camera_keys(views)


@pytest.mark.parametrize("name", REGISTRY)
def test_an_entry_is_consistent(name: str) -> None:
    spec = spec_named(name)
    assert spec.name == name
    assert {*spec.action_modes, *spec.state_modes} <= set(MODES)
    # An absolute dimension is never scaled.
    scaled = [mode not in ("binary", "none") for mode in spec.action_modes]
    assert scaled == [not absolute for absolute in spec.absolute_action]
    with pytest.raises(ValueError, match="8 state columns, 1 modes"):
        dataclasses.replace(spec, state_modes=("none",))
    with pytest.raises(ValueError, match="7 action dims, 1 modes"):
        dataclasses.replace(spec, action_modes=("none",))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([1, 0.6, 0.3, 0], [1, 0, 0, 0]),
        ([0, 0.6, 0.3, 1, 0.5, 0.04], [0, 1, 1, 1, 0, 0]),
        ([0.96, 0.5, 0.6], [1, 0.6, 0.6]),  # undecided to the end: the last raw value
        ([0.95, 0.05, 0.0], [0, 0, 0]),  # the thresholds themselves are undecided
        ([], []),
    ],
)
def test_binarize_gripper(raw: list[float], expected: list[float]) -> None:
    result = binarize_gripper(np.array(raw, np.float32))
    np.testing.assert_array_equal(result, np.array(expected, np.float32), strict=True)


def test_bridge_drops_both_ends_and_takes_the_motion_from_the_states() -> None:
    random = np.random.default_rng(0)
    actions = random.normal(size=(5, 7)).astype(np.float32)
    actions[:, 6] = [1, 1, 0.5, 0, 0]
    states = random.normal(size=(5, 7)).astype(np.float32)
    got_actions, got_states, steps = standardize(spec_named("bridge_dataset"), actions, states)
    np.testing.assert_array_equal(steps, [1, 2, 3])
    np.testing.assert_array_equal(got_actions[:, :6], states[2:, :6] - states[1:-1, :6])
    np.testing.assert_array_equal(got_actions[:, 6], [1, 0, 0])
    expected = np.insert(states[1:-1], 6, 0, axis=1)
    np.testing.assert_array_equal(got_states, expected, strict=True)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_bridge_episode_may_be_too_short_for_a_step(length: int) -> None:
    raw = np.ones((length, 7), np.float32)
    actions, states, steps = standardize(spec_named("bridge_dataset"), raw, raw)
    assert (actions.shape, states.shape, steps.shape) == ((0, 7), (0, 8), (0,))


def test_tabletop_is_left_as_it_is() -> None:
    actions, states = np.ones((3, 7), np.float32), np.ones((3, 8), np.float32)
    got_actions, got_states, steps = standardize(spec_named("lara_tabletop"), actions, states)
    np.testing.assert_array_equal(got_actions, actions, strict=True)
    np.testing.assert_array_equal(got_states, states, strict=True)
    np.testing.assert_array_equal(steps, [0, 1, 2])
