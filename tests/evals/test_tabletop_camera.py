"""Views of the tabletop: the quick way gives the plain way's bits, which are MuJoCo's own hits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

import mujoco

from lara_jax.evals.tabletop import TabletopConfig, TabletopEnv, expert_step
from lara_jax.evals.tabletop.camera import RayCamera, visible_box
from lara_jax.evals.tabletop.scene import VIEWS

BOTH = ("primary", "wrist")


def cameras(env: TabletopEnv, size_px: int, *, shadows: bool = True) -> list[RayCamera]:
    return [RayCamera(env.model, name, size_px, shadows=shadows) for name in BOTH]


def assert_same(camera: RayCamera, env: TabletopEnv) -> None:
    quick, plain = camera.render(env.data), camera.render_plainly(env.data)
    np.testing.assert_array_equal(quick.image, plain.image)
    np.testing.assert_array_equal(quick.geom_ids, plain.geom_ids)


@pytest.mark.parametrize("shadows", [True, False])
def test_quick_pictures_are_the_plain_ones(*, shadows: bool) -> None:
    """Over episodes: the plates move in between, blocks are carried, stacked and thrown about."""
    env = TabletopEnv(TabletopConfig(families=("stack",), image_size_px=16))
    views = cameras(env, 56, shadows=shadows)
    random = np.random.default_rng(0)
    for seed in range(3):
        env.reset(seed=seed)
        for _ in range(24):
            action = expert_step(env).action.astype(np.float64)
            action[3:6] += random.normal(0, 0.2, 3)
            env.step(action + (seed == 2) * random.normal(0, 0.05, 7))
            for camera in views:
                assert_same(camera, env)


@pytest.mark.parametrize("roll_pitch_yaw", [(0, -0.5, 0), (0.5, 0.5, 1.6)])
def test_also_where_the_gripper_is_close_to_the_camera(roll_pitch_yaw: tuple[float, ...]) -> None:
    env = TabletopEnv(TabletopConfig(image_size_px=16))
    env.reset(seed=0)
    for camera in cameras(env, 40):
        env.data.qpos[:6] = (-0.25, 0, 0.3, *roll_pitch_yaw[::-1])
        mujoco.mj_forward(env.model, env.data)
        assert_same(camera, env)


@pytest.mark.parametrize(("name", "part"), [("primary", "stem"), ("wrist", "left_finger")])
def test_each_pixel_shows_the_first_hit(name: str, part: str) -> None:
    """Against one `mj_ray` a pixel, which culls nothing."""
    env = TabletopEnv(TabletopConfig(families=("order",), image_size_px=40, cameras=BOTH))
    env.reset(seed=3)
    hit, normal = np.zeros(1, np.int32), np.zeros(3)
    seen = set()
    for _ in range(10):
        env.step(expert_step(env).action)
        view = VIEWS[name]
        body = env.data.body(view.body)
        turn = body.xmat.reshape(3, 3)
        forward, right, up = (turn @ axis for axis in view.axes)
        extent = np.tan(np.radians(view.field_of_view_deg) / 2)
        origin = body.xpos + turn @ view.position_m
        shown = RayCamera(env.model, name, 40, shadows=True).render(env.data).geom_ids
        for row in range(0, 40, 3):
            for column in range(0, 40, 3):
                across, down = (np.array([column, row]) + 0.5) / 20 - 1
                ray = forward + extent * (across * right - down * up)
                mujoco.mj_ray(env.model, env.data, origin, ray, None, 1, -1, hit, normal)
                assert shown[row, column] == hit[0]
                seen.add(int(hit[0]))
    assert {env.model.geom(shown).id for shown in ("table", part)} <= seen


def test_wrist_camera_moves_with_the_gripper() -> None:
    env = TabletopEnv(TabletopConfig(image_size_px=64, cameras=BOTH))
    observation, _ = env.reset(seed=1)
    block = env.model.geom(env.moves[0].block).id
    wrist = RayCamera(env.model, "wrist", 64, shadows=False)
    while not expert_step(env).subtask.startswith("grasp"):
        observation, *_ = env.step(expert_step(env).action)
    x1, y1, x2, y2 = visible_box(wrist.render(env.data).geom_ids, block)
    assert 0.35 < (x1 + x2) / 2 < 0.65 and 0.3 < (y1 + y2) / 2 < 0.8  # between the fingers
    before = observation["wrist"]
    after = env.step(np.array([0, 0, 0.05, 0, 0, 0.2, 1]))[0]["wrist"]
    assert before.shape == after.shape == (64, 64, 3) and (before != after).mean() > 0.2


def test_opengl_shows_the_same_scene(repository: Path) -> None:
    """In a process of its own: MuJoCo chooses its OpenGL when it is imported."""
    code = """
import json
import numpy as np
from lara_jax.evals.tabletop import TabletopConfig, TabletopEnv
try:
    shown = [
        TabletopEnv(TabletopConfig(renderer=name, cameras=("primary", "wrist"), image_size_px=96))
        for name in ("ray", "gl")
    ]
except ValueError as error:
    print(json.dumps(str(error)))
else:
    seen = [(env.reset(seed=3)[0], env.boxes(*env.block_names)) for env in shown]
    alike = {
        name: float((np.ptp([o[name].astype(int) for o, _ in seen], axis=0) < 60).mean())
        for name in ("primary", "wrist")
    }
    print(json.dumps([alike, float(np.nanmax(np.ptp([boxes for _, boxes in seen], axis=0)))]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env={"MUJOCO_GL": "egl", **os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if result.returncode and "OpenGL" in result.stderr:
        pytest.skip(f"no OpenGL here: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    if isinstance(said, str):
        pytest.skip(said)
    alike, boxes_apart = said
    assert min(alike.values()) > 0.9  # Lambert shading against OpenGL's, and no check on the table
    assert boxes_apart < 2.5 / 96


def test_without_opengl_the_renderer_says_what_it_needs(repository: Path) -> None:
    code = "from lara_jax.evals.tabletop import *; TabletopEnv(TabletopConfig(renderer='gl'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env={**os.environ, "MUJOCO_GL": "disable", "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (
        result.returncode and "renderer 'gl' needs OpenGL, and MUJOCO_GL='disable'" in result.stderr
    )
