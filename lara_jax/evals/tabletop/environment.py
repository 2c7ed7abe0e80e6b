"""The tabletop as a Gymnasium environment: an instruction, 7-D actions at 5 Hz, 1 or 2 cameras.

    observation
      primary      uint8[S, S, 3]; and wrist, if the config asks for it
      state        float32[8] = x y z (m) roll pitch yaw (rad) 0 gripper (0 closed .. 1 open)
      instruction  as "put the red block on the yellow plate"
    action         float32[7] = dx dy dz (m) droll dpitch dyaw (rad) gripper (above 0.5 open)

An action moves the target pose of the gripper, by at most 5 cm along an axis and 0.25 rad about it;
position servos follow it for 0.2 s. The task is solved when each of its blocks lies where it shall,
near the middle of what it lies on, in the order asked for, if one is, and the gripper has let go.

An episode's random numbers (layout, gripper, task) come from the seed of `reset` alone and the
physics is deterministic, so that a seed and a list of actions give the same bytes every time.
"""

from functools import cached_property
from typing import Any, NotRequired, TypedDict, cast

import gymnasium
import mujoco
import numpy as np

from lara_jax.evals.tabletop.camera import Frame, RayCamera, visible_box
from lara_jax.evals.tabletop.gl_camera import GlCamera
from lara_jax.evals.tabletop.layout import WIDER_M, WITHIN_M, sample_positions
from lara_jax.evals.tabletop.scene import (
    FINGER_TRAVEL_M,
    PLATE_HALF_HEIGHT_M,
    TabletopConfig,
    scene_xml,
)
from lara_jax.evals.tabletop.tasks import (
    FAMILIES,
    SPLITS,
    Layout,
    Move,
    Task,
    block_name,
    plate_name,
    propose_task,
)

ACTION_DIM, STATE_DIM = 7, 8
CONTROL_HZ = 5
MAX_MOVE_M, MAX_TURN_RAD = 0.05, 0.25

# Where the TCP may go and where the gripper starts.
TCP_LOW_M, TCP_HIGH_M = (-0.25, -0.30, 0.012), (0.25, 0.30, 0.30)
YAW_PITCH_ROLL_RAD = np.array([1.6, 0.5, 0.5])
START_WITHIN_M, START_HEIGHT_M = (0.05, 0.05), 0.18
TABLE_TRIES = 1_000  # to lay the table so that the family sees a task

# Solved: how far inside the rim of a plate, within what part of the half edge of a block below, and
# how near its resting height the block is; how open the gripper.
RIM_MARGIN_M, ON_BLOCK_SHARE = 0.02, 0.7
HEIGHT_TOLERANCE_M, RELEASED_OPENING = 0.008, 0.75


class Observation(TypedDict):
    """What a policy sees: `primary`, `wrist` uint8[S, S, 3], `state` float32[8], `instruction`."""

    primary: np.ndarray
    wrist: NotRequired[np.ndarray]
    state: np.ndarray
    instruction: str


def episode_seed(seed: int, stream: str, index: int) -> int:
    """Seed for `TabletopEnv.reset` of one episode; the streams never share episodes.

    Args:
      seed: the run's seed, not negative.
      stream: the split, a key of `tasks.SPLITS`.
      index: number of the episode, from 0.

    Raises:
      ValueError: on an unknown stream or a negative number.
    """
    if stream not in SPLITS:
        raise ValueError(f"unknown stream {stream!r}, allowed: {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    sequence = np.random.SeedSequence(seed, spawn_key=(list(SPLITS).index(stream), index))
    return int(sequence.generate_state(1, np.uint64)[0])


class _World:
    """A compiled scene with so many blocks, and its cameras."""

    def __init__(self, config: TabletopConfig, blocks: int) -> None:
        split = SPLITS[config.split]
        xml = scene_xml(config, split.blocks[:blocks], split.plates)
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)
        self._config = config
        self.cameras = {name: self._camera(name, config.image_size_px) for name in config.cameras}

    @cached_property
    def people_camera(self) -> RayCamera | GlCamera:
        """The primary view at the size for people."""
        return self._camera("primary", self._config.render_size_px)

    def _camera(self, name: str, size_px: int) -> RayCamera | GlCamera:
        kind = RayCamera if self._config.renderer == "ray" else GlCamera
        return kind(self.model, name, size_px, shadows=self._config.shadows)


class TabletopEnv(gymnasium.Env[Any, np.ndarray]):
    """Put coloured blocks where the instruction says.

    Args:
      config: the tasks, the scene and the cameras.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012
    render_mode = "rgb_array"

    def __init__(self, config: TabletopConfig | None = None) -> None:
        self.config = config or TabletopConfig()
        self._split = SPLITS[self.config.split]
        self._worlds: dict[int, _World] = {}
        self._enter_world(FAMILIES[self.config.families[0]].blocks)
        self._substeps = round(1 / (CONTROL_HZ * self.model.opt.timestep))
        self._target = np.zeros(6)  # x y z yaw pitch roll, the joints' order
        self._gripper_command = 1.0
        self._frames: dict[str, Frame] = {}
        self._task: Task | None = None
        self._reached: list[int] = []  # numbers of moves, in the order in which they were made
        self.steps = 0
        side = self.config.image_size_px
        limit = np.array([MAX_MOVE_M] * 3 + [MAX_TURN_RAD] * 3, np.float32)
        self.action_space = gymnasium.spaces.Box(
            np.append(-limit, np.float32(0)), np.append(limit, np.float32(1)), dtype=np.float32
        )
        self.observation_space = gymnasium.spaces.Dict(
            {
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float32),
                "instruction": gymnasium.spaces.Text(200, charset="abcdefghijklmnopqrstuvwxyz ,"),
                **{
                    camera: gymnasium.spaces.Box(0, 255, (side, side, 3), np.uint8)
                    for camera in self.config.cameras
                },
            }
        )

    # Gymnasium's interface.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Lays the table anew.

        Args:
          seed: fixes the episode; without it the next one of the present random stream.
          options: `{"family": name}` asks for a task of that one of the config's families;
            without it one is drawn.

        Returns:
          The first observation and `{"family": name}`.

        Raises:
          ValueError: on another option or family, or where no task finds room on the table.
        """
        options = options or {}
        if unknown := sorted(set(options) - {"family"}):
            raise ValueError(f"unknown reset options {', '.join(unknown)}, allowed: family")
        super().reset(seed=seed)
        random, families = self.np_random, self.config.families
        family = options.get("family")
        if family is None:
            family = families[random.integers(len(families))]
        if family not in families:
            raise ValueError(f"unknown family {family!r}, allowed: {', '.join(families)}")
        self._enter_world(FAMILIES[family].blocks)
        mujoco.mj_resetData(self.model, self.data)
        self._task = self._lay_table(family, random)
        self._reached = []
        self._gripper_command = 1.0
        self.data.qpos[:6] = self._target
        self.data.qpos[6:8] = FINGER_TRAVEL_M
        self._command_servos()
        mujoco.mj_forward(self.model, self.data)
        self.steps = 0
        return self._observe(), {"family": family}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Acts for 0.2 s.

        Args:
          action: float[7] (module docstring), clipped to the limits of a step.

        Returns:
          observation; reward (1.0 where the task is solved, else 0.0); terminated (solved);
          truncated (out of steps); `{"family": name}`. The world goes on after either, if asked.

        Raises:
          ValueError: if the action has another shape or a value that is not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,):
            raise ValueError(f"an action has shape ({ACTION_DIM},), got {action.shape}")
        if not np.isfinite(action).all():
            raise ValueError(f"an action must be finite, got {action.tolist()}")
        if self._task is None:
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
        if self._released:
            placed = (number for number, move in enumerate(self.moves) if self.placed(move))
            self._reached += [number for number in placed if number not in self._reached]
        solved, truncated = self.success, self.steps >= self.step_limit
        return self._observe(), float(solved), solved, truncated, {"family": self._task.family}

    def render(self) -> np.ndarray:
        """The present view for people, uint8[R, R, 3] with R = `render_size_px`."""
        return self._world.people_camera.render(self.data).image

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
    def task(self) -> Task:
        """The present episode's task.

        Raises:
          ValueError: before `reset`.
        """
        if self._task is None:
            raise ValueError("call reset before asking for the task")
        return self._task

    @property
    def moves(self) -> tuple[Move, ...]:
        """The moves of the task."""
        return self.task.goal.moves

    @property
    def step_limit(self) -> int:
        """An episode is truncated after so many steps."""
        return self.config.max_steps * len(self.moves)

    @property
    def block_names(self) -> tuple[str, ...]:
        """The bodies of the blocks on the table."""
        blocks = FAMILIES[self.task.family].blocks
        return tuple(map(block_name, self._split.blocks[:blocks]))

    def is_plate(self, name: str) -> bool:
        """True for the name of a plate's body."""
        return name in map(plate_name, self._split.plates)

    def centre_m(self, name: str) -> np.ndarray:
        """Centre of a block or plate, float64[3], by the name of its body."""
        return self.data.body(name).xpos.copy()

    def top_m(self, name: str) -> np.ndarray:
        """Middle of the top of a block or plate, float64[3], by the name of its body."""
        half_height = PLATE_HALF_HEIGHT_M if self.is_plate(name) else self.config.block_half_m
        return self.centre_m(name) + np.array([0, 0, half_height])

    def block_yaw_rad(self, name: str) -> float:
        """Rotation about the vertical of an edge of a block that lies flat, on whatever side."""
        rotation = self.data.body(name).xmat.reshape(3, 3)
        edge = 0 if abs(rotation[2, 0]) < np.sqrt(0.5) else 1
        return float(np.arctan2(rotation[1, edge], rotation[0, edge]))

    def placed(self, move: Move) -> bool:
        """True where the move's block lies where it shall, held or not."""
        if move.off:
            return self._sideways_m(move.block, move.off) > self.config.plate_radius_m
        within = (
            self.config.plate_radius_m - RIM_MARGIN_M
            if self.is_plate(move.target)
            else self.config.block_half_m * ON_BLOCK_SHARE
        )
        height = self.centre_m(move.block)[2] - self.top_m(move.target)[2]
        resting = abs(height - self.config.block_half_m) < HEIGHT_TOLERANCE_M
        return bool(self._sideways_m(move.block, move.target) < within and resting)

    @property
    def success(self) -> bool:
        """True where the goal is reached and the gripper has let go."""
        in_order = not self.task.goal.in_order or self._reached == sorted(self._reached)
        return self._released and in_order and all(map(self.placed, self.moves))

    def boxes(self, *names: str) -> np.ndarray:
        """Where the last observation's primary image shows blocks and plates.

        Args:
          names: of their bodies.

        Returns:
          float32[len(names), 4], x1 y1 x2 y2 as fractions of the image, NaN where hidden.
        """
        if not self._frames:
            raise ValueError("call reset before boxes")
        geom_ids = self._frames["primary"].geom_ids
        return np.stack([visible_box(geom_ids, self.model.geom(name).id) for name in names])

    # Inside.

    @property
    def _released(self) -> bool:
        return self._gripper_command > 0.5 and self.gripper_opening > RELEASED_OPENING

    def _sideways_m(self, one: str, other: str) -> float:
        return float(np.hypot(*(self.centre_m(one) - self.centre_m(other))[:2]))

    def _enter_world(self, blocks: int) -> None:
        """Goes to the scene with so many blocks, compiled on its first use."""
        if blocks not in self._worlds:
            self._worlds[blocks] = _World(self.config, blocks)
        self._world = self._worlds[blocks]

    @property
    def model(self) -> mujoco.MjModel:
        """The MuJoCo model of the present episode."""
        return self._world.model

    @property
    def data(self) -> mujoco.MjData:
        """Its state."""
        return self._world.data

    def _lay_table(self, family: str, random: np.random.Generator) -> Task:
        """Puts everything somewhere, until the family sees a task in it."""
        split, config = self._split, self.config
        colours = split.blocks[: FAMILIES[family].blocks]
        for _ in range(TABLE_TRIES):
            positions = sample_positions(
                random,
                plates=len(split.plates),
                blocks=len(colours),
                plate_radius_m=config.plate_radius_m,
                block_half_m=config.block_half_m,
                within_m=WIDER_M if split.held_out_positions else WITHIN_M,
            )
            plates = dict(zip(split.plates, positions, strict=False))
            blocks = dict(zip(colours, positions[len(plates) :], strict=True))
            yaws = random.uniform(-1, 1, len(colours)) * config.block_yaw_rad
            self._target[:] = (*random.uniform(-1, 1, 2) * START_WITHIN_M, START_HEIGHT_M, 0, 0, 0)
            task = propose_task(
                family,
                Layout(blocks=blocks, plates=plates),
                random,
                held_out_phrasings=split.held_out_phrasings,
            )
            if task is None or (split.held_out_positions and not _starts_outside(task, blocks)):
                continue
            self._put_down(plates, blocks, yaws)
            for block, plate in task.goal.starts_on.items():
                x, y, z = self._mocap_position(plate)
                rest = PLATE_HALF_HEIGHT_M + config.block_half_m
                self._block_pose(block)[:3] = (x, y, z + rest)
            return task
        raise ValueError(f"family {family!r} found no task in {TABLE_TRIES} layouts of the table")

    def _put_down(
        self, plates: dict[str, np.ndarray], blocks: dict[str, np.ndarray], yaws: np.ndarray
    ) -> None:
        """Plates, then blocks, by colour, float64[2] in m, and the blocks' yaws in rad."""
        for colour, position in plates.items():
            self._mocap_position(plate_name(colour))[:] = (*position, PLATE_HALF_HEIGHT_M)
        for (colour, position), yaw in zip(blocks.items(), yaws, strict=True):
            pose = self._block_pose(block_name(colour))
            pose[:3] = (*position, self.config.block_half_m)
            pose[3:] = (np.cos(yaw / 2), 0, 0, np.sin(yaw / 2))

    def _mocap_position(self, plate: str) -> np.ndarray:
        """Position float64[3] of a plate's body, to be written to."""
        return self.data.mocap_pos[self.model.body(plate).mocapid[0]]

    def _block_pose(self, block: str) -> np.ndarray:
        """Position and quaternion float64[7] of a block's body, to be written to."""
        joint = self.model.body(block).jntadr[0]
        return self.data.qpos[self.model.jnt_qposadr[joint] :][:7]

    def _command_servos(self) -> None:
        self.data.ctrl[:6] = self._target
        self.data.ctrl[6:8] = FINGER_TRAVEL_M * self._gripper_command

    def _observe(self) -> Observation:
        cameras = self._world.cameras.items()
        self._frames = {name: camera.render(self.data) for name, camera in cameras}
        roll_pitch_yaw = self.data.qpos[5:2:-1]
        state = np.array([*self.tcp_m, *roll_pitch_yaw, 0, self.gripper_opening], np.float32)
        images = {name: frame.image for name, frame in self._frames.items()}
        observation = {**images, "state": state, "instruction": self.task.instruction}
        return cast(Observation, observation)


def _starts_outside(task: Task, blocks: dict[str, np.ndarray]) -> bool:
    """True where the block to move last starts where no object of the training split does."""
    last = task.goal.moves[-1].block
    position = next(at for colour, at in blocks.items() if block_name(colour) == last)
    return bool((abs(position) > WITHIN_M).any())
