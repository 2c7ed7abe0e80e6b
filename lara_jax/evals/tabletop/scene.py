"""The tabletop as MuJoCo XML: a table, coloured blocks and plates, a floating gripper.

Frame: the origin is the middle of the table top, x points forward (away from the camera), y to the
left, z up. The gripper has no arm: six position-controlled joints hold the tool centre point (TCP,
midway between the finger tips), so that their values ARE the pose of the TCP: x y z in metres, then
yaw, pitch, roll in radians. Everything is made of primitives, so there are no asset files. Two
cameras look at it: `primary` over the robot's shoulder, so that left is the robot's left and far is
forward, and `wrist`, fixed to the gripper, which sees the fingers and what is below them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from lara_jax.evals.tabletop.tasks import FAMILIES, SPLITS, block_name, plate_name

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.12, 0.10),
    "green": (0.15, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.93, 0.80, 0.10),
    "purple": (0.55, 0.15, 0.65),
    "orange": (0.95, 0.50, 0.10),
}

FINGER_TRAVEL_M = 0.04  # how far each finger opens from the middle
PLATE_HALF_HEIGHT_M = 0.003
LIGHT_POSITION_M = (-0.3, 0.4, 1.4)
MOVING_GROUP = 1  # of geoms that move within an episode; those that do not have group 0
RENDERERS = ("ray", "gl")

# A contact type that no other geom takes up. With 0 the geom would be no part of the box around its
# body, outside of which `mj_multiRay` sees nothing (OpenRAL/openral, pull request 111).
NO_CONTACT = 2


@dataclass(frozen=True, kw_only=True)
class View:
    """A camera: what it is fixed to, where it is and looks in that body's frame, how wide it sees.

    Its image is square, with the body's z axis upward.
    """

    body: str
    position_m: tuple[float, float, float]
    look_at_m: tuple[float, float, float]
    field_of_view_deg: float

    @property
    def axes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Unit vectors float64[3] forward, right and up in the body's frame."""
        forward = np.subtract(self.look_at_m, self.position_m)
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right = right / np.linalg.norm(right)
        return forward, right, np.cross(right, forward)


VIEWS = {
    "primary": View(
        body="world",
        position_m=(-0.50, 0.0, 0.62),
        look_at_m=(0.02, 0.0, 0.05),
        field_of_view_deg=36.0,
    ),
    "wrist": View(
        body="hand",
        position_m=(-0.075, 0.0, 0.05),
        look_at_m=(0.015, 0.0, -0.04),
        field_of_view_deg=75.0,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TabletopConfig:
    """What is asked for, what stands on the table and how it is seen.

    The defaults suit a small policy at 64 px.

    Attributes:
      families: of tasks, keys of `tasks.FAMILIES`; each episode is of one of them, by chance.
      split: key of `tasks.SPLITS`: whose colours, positions and phrasings.
      cameras: of the observation, keys of `VIEWS`; the first is "primary".
      image_size_px: side of the square observation images.
      render_size_px: side of the image that `TabletopEnv.render` makes for people.
      renderer: "ray" needs no OpenGL; "gl" is `mujoco.Renderer`, which does.
      shadows: cast shadows (they show the gripper's height).
      max_steps: an episode is truncated after so many actions of 0.2 s for each move that its task
        takes; the expert needs about 25.
      block_half_m: half the edge of a block.   plate_radius_m: radius of a plate.
      block_yaw_rad: blocks are turned by a uniform angle in plus or minus this.
    """

    families: tuple[str, ...] = ("place",)
    split: str = "train"
    cameras: tuple[str, ...] = ("primary",)
    image_size_px: int = 64
    render_size_px: int = 256
    renderer: str = "ray"
    shadows: bool = True
    max_steps: int = 60
    block_half_m: float = 0.02
    plate_radius_m: float = 0.065
    block_yaw_rad: float = 0.3

    def __post_init__(self) -> None:
        _check_some("families", self.families, FAMILIES)
        _check_some("cameras", self.cameras, VIEWS)
        if self.cameras[0] != "primary":
            raise ValueError(f"the first of cameras must be primary, got {self.cameras}")
        if self.split not in SPLITS:
            raise ValueError(f"unknown split {self.split!r}, allowed: {', '.join(SPLITS)}")
        if self.renderer not in RENDERERS:
            raise ValueError(f"unknown renderer {self.renderer!r}, allowed: {', '.join(RENDERERS)}")
        if min(self.image_size_px, self.render_size_px) < 16:
            raise ValueError(
                f"image_size_px and render_size_px must be at least 16, "
                f"got {self.image_size_px} and {self.render_size_px}"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if not 0.01 <= self.block_half_m <= 0.025:
            raise ValueError(
                f"block_half_m must lie in [0.01, 0.025] so that the gripper can take a block, "
                f"got {self.block_half_m}"
            )
        if not 0.03 <= self.plate_radius_m <= 0.08:
            raise ValueError(f"plate_radius_m must lie in [0.03, 0.08], got {self.plate_radius_m}")


def _check_some(what: str, given: Sequence[str], known: Collection[str]) -> None:
    """Refuses names that are unknown, given twice, or none at all."""
    for name in given:
        if name not in known:
            raise ValueError(f"{what}: unknown {name!r}, allowed: {', '.join(known)}")
    if not given or len(set(given)) != len(given):
        raise ValueError(f"{what} must be one or more different names, got {tuple(given)}")


def _rgba(colour: str) -> str:
    return " ".join(f"{channel:g}" for channel in (*COLOURS[colour], 1.0))


def _block_xml(colour: str, config: TabletopConfig) -> str:
    name, half = block_name(colour), config.block_half_m
    return f"""
    <body name="{name}" pos="0 0 {half}">
      <freejoint/>
      <geom name="{name}" type="box" size="{half} {half} {half}" mass="0.05" rgba="{_rgba(colour)}"
            friction="1.5 0.02 0.001" condim="4" group="{MOVING_GROUP}"/>
    </body>"""


def _plate_xml(colour: str, config: TabletopConfig) -> str:
    name = plate_name(colour)
    size = f"{config.plate_radius_m} {PLATE_HALF_HEIGHT_M}"
    return f"""
    <body name="{name}" mocap="true">
      <geom name="{name}" type="cylinder" size="{size}" rgba="{_rgba(colour)}"/>
    </body>"""


def _finger_xml(name: str, side: int) -> str:
    return f"""
      <body name="{name}" gravcomp="1">
        <joint name="{name}" type="slide" axis="0 {side} 0" range="0 {FINGER_TRAVEL_M}"
               limited="true" damping="8" armature="0.05"/>
        <geom name="{name}" type="box" size="0.009 0.005 0.03" pos="0 {side * 0.005} 0.02"
              mass="0.03" rgba="0.15 0.15 0.16 1" friction="2 0.05 0.001" condim="4"
              group="{MOVING_GROUP}"/>
      </body>"""


def _camera_xml(name: str) -> str:
    view = VIEWS[name]
    _, right, up = view.axes
    position, axes = (" ".join(map(str, v)) for v in (view.position_m, (*right, *up)))
    return (
        f'<camera name="{name}" pos="{position}" xyaxes="{axes}" fovy="{view.field_of_view_deg}"/>'
    )


def scene_xml(config: TabletopConfig, blocks: Sequence[str], plates: Sequence[str]) -> str:
    """MuJoCo model of the scene.

    Args:
      config: sizes and shadows.
      blocks, plates: colours of those on the table, keys of `COLOURS`.

    Returns:
      MJCF text. Joints 0..5 are x y z yaw pitch roll of the TCP, 6 and 7 the fingers, and the
      actuators are in the same order; then follows one free joint per block. Plates are mocap
      bodies: they are put somewhere and do not move.
    """
    block_bodies = "".join(_block_xml(colour, config) for colour in blocks)
    plate_bodies = "".join(_plate_xml(colour, config) for colour in plates)
    light = " ".join(map(str, LIGHT_POSITION_M))
    shadows = str(config.shadows).lower()
    return f"""
<mujoco model="lara_tabletop">
  <compiler angle="radian"/>
  <option timestep="0.004" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <asset>
    <texture type="skybox" builtin="flat" rgb1="0.75 0.82 0.9" rgb2="0.75 0.82 0.9" width="64"
             height="64"/>
  </asset>
  <visual><headlight ambient="0.45 0.45 0.45" diffuse="0 0 0" specular="0 0 0"/></visual>
  <worldbody>
    <light pos="{light}" dir="0 0 -1" cutoff="80" exponent="0" castshadow="{shadows}"
           ambient="0 0 0" diffuse="0.6 0.6 0.6" specular="0 0 0"/>
    {_camera_xml("primary")}
    <geom name="table" type="box" size="0.35 0.45 0.02" pos="0 0 -0.02" rgba="0.72 0.6 0.45 1"/>
    <geom name="floor" type="plane" size="2 2 0.1" pos="0 0 -0.5" rgba="0.55 0.57 0.6 1"/>
    <body name="hand" gravcomp="1">
      <joint name="x" type="slide" axis="1 0 0" damping="60" armature="1"/>
      <joint name="y" type="slide" axis="0 1 0" damping="60" armature="1"/>
      <joint name="z" type="slide" axis="0 0 1" damping="60" armature="1"/>
      <joint name="yaw" type="hinge" axis="0 0 1" damping="4" armature="0.02"/>
      <joint name="pitch" type="hinge" axis="0 1 0" damping="4" armature="0.02"/>
      <joint name="roll" type="hinge" axis="1 0 0" damping="4" armature="0.02"/>
      <geom name="stem" type="capsule" fromto="0 0 0.07 0 0 0.42" size="0.022" mass="0.2"
            rgba="0.85 0.85 0.87 1" contype="{NO_CONTACT}" conaffinity="0" group="{MOVING_GROUP}"/>
      <geom name="palm" type="box" size="0.02 0.05 0.015" pos="0 0 0.065" mass="0.2"
            rgba="0.3 0.3 0.33 1" group="{MOVING_GROUP}"/>
      {_camera_xml("wrist")}{_finger_xml("left_finger", 1)}{_finger_xml("right_finger", -1)}
    </body>{block_bodies}{plate_bodies}
  </worldbody>
  <actuator>
    <position joint="x" kp="1500"/>
    <position joint="y" kp="1500"/>
    <position joint="z" kp="1500"/>
    <position joint="yaw" kp="60"/>
    <position joint="pitch" kp="60"/>
    <position joint="roll" kp="60"/>
    <position joint="left_finger" kp="150" forcerange="-6 6"/>
    <position joint="right_finger" kp="150" forcerange="-6 6"/>
  </actuator>
</mujoco>"""
