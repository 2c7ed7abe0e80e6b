"""The built-in tabletop: reproducible, solvable, annotated rightly, strict about its input."""

import gymnasium
import numpy as np
import pytest

pytest.importorskip("mujoco")

from gymnasium.utils.env_checker import check_env

from lara_jax.evals.tabletop import (
    FAMILIES,
    SPLITS,
    TabletopConfig,
    TabletopEnv,
    episode_seed,
    expert_step,
)
from lara_jax.evals.tabletop.camera import visible_box
from lara_jax.evals.tabletop.expert import motion_text
from lara_jax.evals.tabletop.layout import sample_positions
from lara_jax.evals.tabletop.scene import FINGER_TRAVEL_M

SUBTASKS = (
    "move to the {block} block",
    "lower to the {block} block",
    "grasp the {block} block",
    "lift the {block} block",
    "move to the {plate} plate",
    "lower onto the {plate} plate",
    "release the {block} block",
    "retreat",
)
STAY_OPEN = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def env() -> TabletopEnv:
    return TabletopEnv()


def solve(env: TabletopEnv, seed: int) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Images, states and subtasks of the expert's episode."""
    observation, _ = env.reset(seed=seed)
    images, states, subtasks = [observation["primary"]], [observation["state"]], []
    while not (step := expert_step(env)).done and env.steps < env.config.max_steps:
        observation, *_ = env.step(step.action)
        images.append(observation["primary"])
        states.append(observation["state"])
        subtasks.append(step.subtask)
    return images, states, subtasks


@pytest.mark.filterwarnings("ignore:.*A Box observation space")  # the state has no bounds
def test_is_a_gymnasium_environment() -> None:
    env: gymnasium.Env = TabletopEnv(
        TabletopConfig(families=tuple(FAMILIES), cameras=("primary", "wrist"), render_size_px=32)
    )
    check_env(env, skip_render_check=True)
    assert env.render().shape == (32, 32, 3)


def test_seed_gives_the_same_bytes_in_a_used_and_a_new_environment(env: TabletopEnv) -> None:
    solve(env, 6)
    used, new = solve(env, 7), solve(TabletopEnv(), 7)
    for one, other in zip(used[:2], new[:2], strict=True):
        np.testing.assert_array_equal(one, other)
    other_seed, _ = env.reset(seed=8)
    assert (other_seed["primary"] != used[0][0]).any()


@pytest.mark.parametrize("index", range(10))
def test_expert_solves_and_names_its_subtasks_in_order(env: TabletopEnv, index: int) -> None:
    _, _, subtasks = solve(env, episode_seed(0, "eval", index))
    assert env.success
    block, plate = (name.split("_")[0] for name in (env.moves[0].block, env.moves[0].target))
    expected = [text.format(block=block, plate=plate) for text in SUBTASKS]
    assert list(dict.fromkeys(subtasks)) == expected
    assert 12 <= env.steps <= 35


@pytest.mark.parametrize(
    "config",
    [TabletopConfig(block_half_m=0.015, plate_radius_m=0.05, block_yaw_rad=0.7)],
)
def test_expert_solves_other_scenes(config: TabletopConfig) -> None:
    env = TabletopEnv(config)
    for seed in range(3):
        solve(env, seed)
        assert env.success


def test_action_moves_the_gripper_by_what_it_says(env: TabletopEnv) -> None:
    before = env.reset(seed=0)[0]["state"]
    after = env.step(np.array([0.03, -0.02, 0.01, 0, 0, 0.1, 0]))[0]["state"]
    np.testing.assert_allclose(after[:3] - before[:3], [0.03, -0.02, 0.01], atol=2e-3)
    np.testing.assert_allclose(after[3:6], [0, 0, 0.1], atol=1e-2)
    assert before[7] == 1 and after[7] < 0.2 and before[6] == after[6] == 0


def test_roll_pitch_yaw_have_the_same_order_in_action_and_state(env: TabletopEnv) -> None:
    env.reset(seed=0)
    after = env.step(np.array([0, 0, 0, 0.05, 0.1, 0.15, 1]))[0]["state"]
    np.testing.assert_allclose(after[3:6], [0.05, 0.1, 0.15], atol=1e-2)


def test_an_action_is_clipped_to_one_step(env: TabletopEnv) -> None:
    before = env.reset(seed=0)[0]["state"]
    after = env.step(np.array([9.0, 0, 0, 0, 0, 0, 1]))[0]["state"]
    assert 0.03 < after[0] - before[0] < 0.06


def test_truncates_out_of_steps_and_does_not_solve_itself() -> None:
    env = TabletopEnv(TabletopConfig(max_steps=3))
    env.reset(seed=0)
    results = [env.step(STAY_OPEN)[1:4] for _ in range(3)]
    assert results == [(0.0, False, False), (0.0, False, False), (0.0, False, True)]


def test_success_needs_an_open_gripper(env: TabletopEnv) -> None:
    solve(env, 0)
    assert env.success
    env.step(np.zeros(7))
    assert not env.success


@pytest.mark.parametrize("first", ["block", "target"])
def test_boxes_hold_the_objects_colours(env: TabletopEnv, first: str) -> None:
    observation, _ = env.reset(seed=3)
    name = getattr(env.moves[0], first)
    x1, y1, x2, y2 = env.boxes(name)[0] * env.config.image_size_px
    inside = observation["primary"][int(y1) : int(y2), int(x1) : int(x2)].astype(int)
    outside = observation["primary"].astype(int)
    outside[int(y1) : int(y2), int(x1) : int(x2)] = 128
    colour = env.model.geom(name).rgba[:3]

    def alike(pixels: np.ndarray) -> int:
        hue = pixels / np.linalg.norm(pixels, axis=-1, keepdims=True).clip(1)
        return int((hue @ (colour / np.linalg.norm(colour)) > 0.999).sum())

    assert alike(inside) > 5 and alike(outside) == 0


def test_box_is_in_image_fractions_and_nan_where_hidden() -> None:
    geom_ids = np.full((10, 10), -1, np.int32)
    geom_ids[2:4, 5:10] = 7
    np.testing.assert_array_equal(visible_box(geom_ids, 7), np.float32([0.5, 0.2, 1.0, 0.4]))
    assert np.isnan(visible_box(geom_ids, 8)).all()


def test_shadows_only_darken() -> None:
    images = [
        TabletopEnv(TabletopConfig(shadows=shadows)).reset(seed=1)[0]["primary"].astype(int)
        for shadows in (True, False)
    ]
    assert (images[0] <= images[1]).all() and (images[0] < images[1]).any()


@pytest.mark.parametrize(
    ("way_m", "gripper_change", "text"),
    [
        ((0.05, 0.03, -0.1), 0, "Move forward and left, then down."),
        ((-0.05, -0.03, 0.1), 0, "Move backward and right, then up."),
        ((0.0, 0.009, -0.1), -1, "Move down."),
        ((0.0, 0.0, 0.0), -1, "Close the gripper."),
        ((0.0, 0.0, 0.0), 1, "Open the gripper."),
        ((0.009, 0.0, 0.0), 0, "Hold still."),
    ],
)
def test_motion_text(way_m: tuple[float, ...], gripper_change: float, text: str) -> None:
    assert motion_text(np.array(way_m), gripper_change) == text


@pytest.mark.parametrize("split", ["train", "eval_positions"])
def test_objects_do_not_overlap(split: str) -> None:
    env = TabletopEnv(TabletopConfig(families=("place", "ordinal"), split=split, image_size_px=16))
    config = env.config
    for seed in range(20):
        env.reset(seed=seed)
        block = [env.centre_m(name)[:2] for name in env.block_names]
        plate = [env.centre_m(f"{colour}_plate")[:2] for colour in SPLITS[split].plates]
        width = config.block_half_m * np.sqrt(2)
        assert np.linalg.norm(plate[0] - plate[1]) > 2 * config.plate_radius_m
        for index, position in enumerate(block):
            assert all(np.linalg.norm(position - p) > config.plate_radius_m + width for p in plate)
            assert all(np.linalg.norm(position - b) > 2 * width for b in block[:index])
        assert env.gripper_opening * FINGER_TRAVEL_M > width  # it can take a turned block


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros(6), r"shape \(7,\), got \(6,\)"),
        (np.zeros((1, 7)), r"got \(1, 7\)"),
        (np.array([0, 0, np.nan, 0, 0, 0, 1]), "finite"),
        (np.array([np.inf, 0, 0, 0, 0, 0, 1]), "finite"),
    ],
)
def test_bad_actions_raise(env: TabletopEnv, action: np.ndarray, message: str) -> None:
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)


def test_use_before_reset_and_unknown_options_raise() -> None:
    env = TabletopEnv()
    with pytest.raises(ValueError, match="reset before step"):
        env.step(STAY_OPEN)
    with pytest.raises(ValueError, match="unknown reset options colour, allowed: family"):
        env.reset(seed=0, options={"colour": "red"})
    with pytest.raises(ValueError, match="unknown family 'stack', allowed: place"):
        env.reset(seed=0, options={"family": "stack"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size_px": 8}, "at least 16"),
        ({"max_steps": 0}, "max_steps"),
        ({"families": ("place", "sweep")}, "families: unknown 'sweep', allowed: place, stack"),
        ({"families": ("place", "place")}, "families must be one or more different"),
        ({"families": ()}, "families must be one or more"),
        ({"cameras": ("primary", "left")}, "cameras: unknown 'left', allowed: primary, wrist"),
        ({"cameras": ("wrist", "primary")}, "first of cameras must be primary"),
        ({"split": "test"}, "unknown split 'test', allowed: train, val, eval, eval_colours"),
        ({"renderer": "vulkan"}, "unknown renderer 'vulkan', allowed: ray, gl"),
        ({"block_half_m": 0.05}, "block_half_m"),
        ({"plate_radius_m": 0.2}, "plate_radius_m"),
    ],
)
def test_bad_configs_raise(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabletopConfig(**change)


def test_a_table_without_room_raises() -> None:
    with pytest.raises(ValueError, match=r"no room for 4 blocks and 9 plates of radius 0\.08 m"):
        sample_positions(
            np.random.default_rng(0), plates=9, blocks=4, plate_radius_m=0.08, block_half_m=0.02
        )


def test_streams_have_their_own_seeds() -> None:
    seeds = {
        episode_seed(seed, stream, index)
        for seed in (0, 1)
        for stream in SPLITS
        for index in range(50)
    }
    assert len(seeds) == 100 * len(SPLITS)
    for wrong in (("test", 0, 0), ("eval", -1, 0), ("eval", 0, -1)):
        with pytest.raises(ValueError):
            episode_seed(wrong[1], wrong[0], wrong[2])
