"""The tabletop as MuJoCo XML: a table, coloured blocks and plates, a floating gripper.

Frame: the origin is the middle of the table top, x points forward (away from the camera), y to the
left, z up. The gripper has no arm: six position-controlled joints hold the tool centre point (TCP,
midway between the finger tips), so that their values ARE the pose of the TCP: x y z in metres, then
yaw, pitch, roll in radians. Everything is made of primitives, so there are no asset files.
"""

from dataclasses import dataclass

Colour = tuple[float, float, float]

COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.12, 0.10),
    "green": (0.15, 0.65, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.93, 0.80, 0.10),
    "purple": (0.55, 0.15, 0.65),
}

FINGER_TRAVEL_M = 0.04  # how far each finger opens from the middle
PLATE_HALF_HEIGHT_M = 0.003


@dataclass(frozen=True, kw_only=True)
class TabletopConfig:
    """What stands on the table and how it is seen. The defaults suit a small policy at 64 px.

    Attributes:
      image_size_px: side of the square observation image.
      render_size_px: side of the image that `TabletopEnv.render` makes for people.
      shadows: cast shadows (they show the gripper's height; about halves the frame rate).
      max_steps: an episode is truncated after so many actions of 0.2 s; the expert needs about 25.
      blocks, plates: their colours, keys of `COLOURS`.
      block_half_m: half the edge of a block.   plate_radius_m: radius of a plate.
      block_yaw_rad: blocks are turned by a uniform angle in plus or minus this.
    """

    image_size_px: int = 64
    render_size_px: int = 256
    shadows: bool = True
    max_steps: int = 60
    blocks: tuple[str, ...] = ("red", "green", "blue")
    plates: tuple[str, ...] = ("yellow", "purple")
    block_half_m: float = 0.02
    plate_radius_m: float = 0.065
    block_yaw_rad: float = 0.3

    def __post_init__(self) -> None:
        if min(self.image_size_px, self.render_size_px) < 16:
            raise ValueError(
                f"image_size_px and render_size_px must be at least 16, "
                f"got {self.image_size_px} and {self.render_size_px}"
            )
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        for kind, names in (("blocks", self.blocks), ("plates", self.plates)):
            if not names or len(set(names)) != len(names) or not set(names) <= set(COLOURS):
                raise ValueError(
                    f"{kind} must be one or more different colours out of {', '.join(COLOURS)}, "
                    f"got {names}"
                )
        if not 0.01 <= self.block_half_m <= 0.025:
            raise ValueError(
                f"block_half_m must lie in [0.01, 0.025] so that the gripper can take a block, "
                f"got {self.block_half_m}"
            )
        if not 0.03 <= self.plate_radius_m <= 0.08:
            raise ValueError(f"plate_radius_m must lie in [0.03, 0.08], got {self.plate_radius_m}")


def block_name(colour: str) -> str:
    """Name of a block's body and geom: `"red"` -> `"red_block"`."""
    return f"{colour}_block"


def plate_name(colour: str) -> str:
    """Name of a plate's body and geom: `"yellow"` -> `"yellow_plate"`."""
    return f"{colour}_plate"


def _rgba(colour: str) -> str:
    return " ".join(f"{channel:g}" for channel in (*COLOURS[colour], 1.0))


def _block_xml(colour: str, config: TabletopConfig) -> str:
    name, half = block_name(colour), config.block_half_m
    return f"""
    <body name="{name}" pos="0 0 {half}">
      <freejoint/>
      <geom name="{name}" type="box" size="{half} {half} {half}" mass="0.05" rgba="{_rgba(colour)}"
            friction="1.5 0.02 0.001" condim="4"/>
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
              mass="0.03" rgba="0.15 0.15 0.16 1" friction="2 0.05 0.001" condim="4"/>
      </body>"""


def scene_xml(config: TabletopConfig) -> str:
    """MuJoCo model of the scene.

    Args:
      config: what stands on the table.

    Returns:
      MJCF text. Joints 0..5 are x y z yaw pitch roll of the TCP, 6 and 7 the fingers, and the
      actuators are in the same order; then follows one free joint per block. Plates are mocap
      bodies: they are put somewhere and do not move.
    """
    blocks = "".join(_block_xml(colour, config) for colour in config.blocks)
    plates = "".join(_plate_xml(colour, config) for colour in config.plates)
    return f"""
<mujoco model="lara_tabletop">
  <compiler angle="radian"/>
  <option timestep="0.004" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <worldbody>
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
            rgba="0.85 0.85 0.87 1" contype="0" conaffinity="0"/>
      <geom name="palm" type="box" size="0.02 0.05 0.015" pos="0 0 0.065" mass="0.2"
            rgba="0.3 0.3 0.33 1"/>{_finger_xml("left_finger", 1)}{_finger_xml("right_finger", -1)}
      <site name="tcp"/>
    </body>{blocks}{plates}
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
