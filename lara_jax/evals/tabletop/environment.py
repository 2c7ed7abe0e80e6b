"""The tabletop as a Gymnasium environment: one instruction, 7-D actions at 5 Hz, one camera.

    observation
      image        uint8[S, S, 3]
      state        float32[8] = x y z (m) roll pitch yaw (rad) 0 gripper (0 closed .. 1 open)
      instruction  as "put the red block on the yellow plate"
    action         float32[7] = dx dy dz (m) droll dpitch dyaw (rad) gripper (above 0.5 open)

An action moves the target pose of the gripper, by at most 5 cm along an axis and 0.25 rad about it;
position servos follow it for 0.2 s. The task is solved when the block lies on the plate, near its
middle, and the gripper has let go of it. An episode's random numbers (layout, gripper, task) come
from the seed of `reset` alone and the physics is deterministic, so that a seed and a list of
actions give the same bytes every time.
"""

from functools import cached_property
from typing import Any, TypedDict

import gymnasium
import mujoco
import numpy as np

from lara_jax.evals.tabletop.camera import Frame, RayCamera, visible_box
from lara_jax.evals.tabletop.scene import (
    FINGER_TRAVEL_M,
    PLATE_HALF_HEIGHT_M,
    TabletopConfig,
    block_name,
    plate_name,
    scene_xml,
)

ACTION_DIM, STATE_DIM = 7, 8
CONTROL_HZ = 5
MAX_MOVE_M, MAX_TURN_RAD = 0.05, 0.25

# Where the TCP may go, where objects are put and where the gripper starts.
TCP_LOW_M, TCP_HIGH_M = (-0.25, -0.30, 0.012), (0.25, 0.30, 0.30)
YAW_PITCH_ROLL_RAD = np.array([1.6, 0.5, 0.5])
OBJECTS_WITHIN_M = (0.13, 0.18)
START_WITHIN_M, START_HEIGHT_M = (0.05, 0.05), 0.18
# Free space between two objects; a block needs room for the fingers.
GAP_AT_BLOCK_M, GAP_BETWEEN_PLATES_M = 0.012, 0.01
FINGER_ROOM_M = 0.03
LAYOUT_TRIES = 10_000

# Solved: how far inside the rim, how near its resting height the block is; how open the gripper.
RIM_MARGIN_M, HEIGHT_TOLERANCE_M, RELEASED_OPENING = 0.02, 0.008, 0.75

_STREAMS = ("train", "val", "eval")


class Observation(TypedDict):
    """What a policy sees: `primary` uint8[S, S, 3], `state` float32[8], `instruction`."""

    primary: np.ndarray
    state: np.ndarray
    instruction: str


def episode_seed(seed: int, stream: str, index: int) -> int:
    """Seed for `TabletopEnv.reset` of one episode; the streams never share episodes.

    Args:
      seed: the run's seed, not negative.
      stream: "train", "val" or "eval".
      index: number of the episode, from 0.

    Raises:
      ValueError: on an unknown stream or a negative number.
    """
    if stream not in _STREAMS:
        raise ValueError(f"unknown stream {stream!r}, allowed: {', '.join(_STREAMS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(stream), index))
    return int(sequence.generate_state(1, np.uint64)[0])


class TabletopEnv(gymnasium.Env[Any, np.ndarray]):
    """Put a coloured block on a coloured plate.

    Args:
      config: the scene and its image sizes.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, config: TabletopConfig | None = None) -> None:
        self.config = config or TabletopConfig()
        self.model = mujoco.MjModel.from_xml_string(scene_xml(self.config))
        self.data = mujoco.MjData(self.model)
        self._camera = self._make_camera(self.config.image_size_px)
        self._substeps = round(1 / (CONTROL_HZ * self.model.opt.timestep))
        self._target = np.zeros(6)  # x y z yaw pitch roll, the joints' order
        self._gripper_command = 1.0
        self._frame: Frame | None = None
        self.block, self.plate, self.instruction = "", "", ""
        self.steps = 0
        side = self.config.image_size_px
        limit = np.array([MAX_MOVE_M] * 3 + [MAX_TURN_RAD] * 3, np.float32)
        self.action_space = gymnasium.spaces.Box(
            np.append(-limit, np.float32(0)), np.append(limit, np.float32(1)), dtype=np.float32
        )
        self.observation_space = gymnasium.spaces.Dict(
            {
                "primary": gymnasium.spaces.Box(0, 255, (side, side, 3), np.uint8),
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32),
                "instruction": gymnasium.spaces.Text(100, charset="abcdefghijklmnopqrstuvwxyz "),
            }
        )

    # Gymnasium's interface.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Lays the table anew.

        Args:
          seed: fixes the episode; without it the next one of the present random stream.
          options: none are known.

        Returns:
          The first observation and an empty dictionary.

        Raises:
          ValueError: on options.
        """
        if options:
            raise ValueError(f"the tabletop has no reset options, got {sorted(options)}")
        super().reset(seed=seed)
        random = self.np_random
        mujoco.mj_resetData(self.model, self.data)
        self._lay_table(random)
        self._target[:] = (*random.uniform(-1, 1, 2) * START_WITHIN_M, START_HEIGHT_M, 0, 0, 0)
        self._gripper_command = 1.0
        self.data.qpos[:6] = self._target
        self.data.qpos[6:8] = FINGER_TRAVEL_M
        self._command_servos()
        mujoco.mj_forward(self.model, self.data)
        self.block = str(random.choice(self.config.blocks))
        self.plate = str(random.choice(self.config.plates))
        self.instruction = f"put the {self.block} block on the {self.plate} plate"
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Acts for 0.2 s.

        Args:
          action: float[7] (module docstring), clipped to the limits of a step.

        Returns:
          observation; reward (1.0 where the task is solved, else 0.0); terminated (solved);
          truncated (out of steps); an empty dictionary. The world goes on after either, if asked.

        Raises:
          ValueError: if the action has another shape or a value that is not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,):
            raise ValueError(f"an action has shape ({ACTION_DIM},), got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"an action must be finite, got {action.tolist()}")
        if self._frame is None:
            raise ValueError("call reset before step")
        self._target[:3] += np.clip(action[:3], -MAX_MOVE_M, MAX_MOVE_M)
        self._target[:3] = np.clip(self._target[:3], TCP_LOW_M, TCP_HIGH_M)
        roll_pitch_yaw = np.clip(action[3:6], -MAX_TURN_RAD, MAX_TURN_RAD)
        self._target[3:] += roll_pitch_yaw[::-1]
        self._target[3:] = np.clip(self._target[3:], -YAW_PITCH_ROLL_RAD, YAW_PITCH_ROLL_RAD)
        self._gripper_command = float(action[6] > 0.5)
        self._command_servos()
        mujoco.mj_step(self.model, self.data, self._substeps)
        self.steps += 1
        solved = self.success
        return self._observe(), float(solved), solved, self.steps >= self.config.max_steps, {}

    def render(self) -> np.ndarray:
        """The present view for people, uint8[R, R, 3] with R = `render_size_px`."""
        return self._people_camera.render(self.data).image

    # What the expert, the annotations and the success test read.

    @property
    def tcp_m(self) -> np.ndarray:
        """Position of the tool centre point, float64[3]."""
        return self.data.qpos[:3].copy()

    @property
    def yaw_rad(self) -> float:
        """Rotation of the gripper about the vertical."""
        return float(self.data.qpos[3])

    @property
    def gripper_opening(self) -> float:
        """0 closed to 1 open, mean of both fingers."""
        return float(np.clip(self.data.qpos[6:8].mean() / FINGER_TRAVEL_M, 0, 1))

    @property
    def gripper_command(self) -> float:
        """What the last action told the gripper: 1 open, 0 closed."""
        return self._gripper_command

    @property
    def block_m(self) -> np.ndarray:
        """Centre of the block to move, float64[3]."""
        return self.data.body(block_name(self.block)).xpos.copy()

    @property
    def block_yaw_rad(self) -> float:
        """Rotation of the block to move about the vertical."""
        rotation = self.data.body(block_name(self.block)).xmat.reshape(3, 3)
        return float(np.arctan2(rotation[1, 0], rotation[0, 0]))

    @property
    def plate_m(self) -> np.ndarray:
        """Middle of the top of the plate to reach, float64[3]."""
        middle = self.data.body(plate_name(self.plate)).xpos
        return middle + np.array([0, 0, PLATE_HALF_HEIGHT_M])

    @property
    def success(self) -> bool:
        """True where the block lies on the plate and the gripper has let go."""
        offset = self.block_m - self.plate_m
        inside = np.hypot(offset[0], offset[1]) < self.config.plate_radius_m - RIM_MARGIN_M
        resting = abs(offset[2] - self.config.block_half_m) < HEIGHT_TOLERANCE_M
        released = self._gripper_command > 0.5 and self.gripper_opening > RELEASED_OPENING
        return bool(inside and resting and released)

    def boxes(self) -> np.ndarray:
        """Where the last observation shows the block to move and the plate to reach.

        Returns:
          float32[2, 4], rows block and plate: x1 y1 x2 y2 as fractions of the image, NaN where
          hidden.
        """
        if self._frame is None:
            raise ValueError("call reset before boxes")
        names = (block_name(self.block), plate_name(self.plate))
        geom_ids = self._frame.geom_ids
        return np.stack([visible_box(geom_ids, self.model.geom(name).id) for name in names])

    # Inside.

    def _make_camera(self, size_px: int) -> RayCamera:
        return RayCamera(self.model, size_px, shadows=self.config.shadows)

    @cached_property
    def _people_camera(self) -> RayCamera:
        return self._make_camera(self.config.render_size_px)

    def _lay_table(self, random: np.random.Generator) -> None:
        plates, blocks = self._layout(random)
        for colour, position in zip(self.config.plates, plates, strict=True):
            mocap = self.model.body(plate_name(colour)).mocapid[0]
            self.data.mocap_pos[mocap] = (*position, PLATE_HALF_HEIGHT_M)
        for colour, position in zip(self.config.blocks, blocks, strict=True):
            yaw = random.uniform(-1, 1) * self.config.block_yaw_rad
            joint = self.model.body(block_name(colour)).jntadr[0]
            pose = self.data.qpos[self.model.jnt_qposadr[joint] :][:7]
            pose[:3] = (*position, self.config.block_half_m)
            pose[3:] = (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))

    def _layout(self, random: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Positions float64[2] of plates and blocks that leave room between them, by rejection."""
        plate_radius = self.config.plate_radius_m
        block_radius = np.sqrt(2) * self.config.block_half_m
        for _ in range(LAYOUT_TRIES):
            plates = [random.uniform(-1, 1, 2) * OBJECTS_WITHIN_M for _ in self.config.plates]
            blocks = [random.uniform(-1, 1, 2) * OBJECTS_WITHIN_M for _ in self.config.blocks]
            if (
                _apart(plates, plates, 2 * plate_radius + GAP_BETWEEN_PLATES_M)
                and _apart(plates, blocks, plate_radius + block_radius + GAP_AT_BLOCK_M)
                and _apart(blocks, blocks, 2 * block_radius + FINGER_ROOM_M)
            ):
                return plates, blocks
        raise ValueError(
            f"found no room for {len(self.config.blocks)} blocks and {len(self.config.plates)} "
            f"plates of radius {plate_radius} m in {LAYOUT_TRIES} tries"
        )

    def _command_servos(self) -> None:
        self.data.ctrl[:6] = self._target
        self.data.ctrl[6:8] = FINGER_TRAVEL_M * self._gripper_command

    def _observe(self) -> Observation:
        self._frame = self._camera.render(self.data)
        roll_pitch_yaw = self.data.qpos[5:2:-1]
        state = np.array([*self.tcp_m, *roll_pitch_yaw, 0, self.gripper_opening], np.float32)
        return {"primary": self._frame.image, "state": state, "instruction": self.instruction}


def _apart(one: list[np.ndarray], other: list[np.ndarray], distance_m: float) -> bool:
    """True if each of `one` is farther than `distance_m` from each of `other` (but itself)."""
    return all(np.linalg.norm(a - b) > distance_m for a in one for b in other if a is not b)
