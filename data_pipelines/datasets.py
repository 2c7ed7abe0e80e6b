"""What each dataset is, as data, and how its raw steps become ours.

Every dataset ends in one form: an action is [dx dy dz (m), droll dpitch dyaw (rad), gripper], the
gripper absolute, 1 open and 0 closed; a state is POS_EULER, [x y z (m), roll pitch yaw (rad), 0,
gripper]. A `DatasetSpec` says which features to read and which of three rules bring them there:
drop the first step, take the motion from the states, make the gripper binary. A dataset is
recognised by the name in its dataset_info.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data_pipelines.rlds.directory import STEPS

ACTION_DIM = 7
# Percentiles for the motion, the gripper apart (LaRA-VLA 93b5c03, data configuration oxe_bridge).
_MOTION = ("q99",) * 6


@dataclass(frozen=True, kw_only=True)
class ReasoningKeys:
    """Where a dataset keeps its reasoning annotations: flat feature keys.

    Attributes:
      subtask: text.
      boxes: float32[n, 4], normalised xyxy; a row of NaN is a box that is not visible.
      motion: text.
    """

    subtask: str
    boxes: str
    motion: str


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset.

    Attributes:
      name: as in dataset_info.json.
      robot, source, licence: for people.
      control_hz: steps a second.
      cameras: feature key of each view, by the view's name.
      default_views: the views used unless a recipe names others; the first is the primary one.
      action_key, state_key, language_key: flat feature keys.
      raw_action_dim, raw_state_dim: widths of the action and state features.
      action_encoding: "EEF_POS", changes of the end effector's pose in the robot's base frame.
      absolute_action: per action dimension, True where it is a position to hold, not a change.
      state_encoding: "POS_EULER".
      state_columns: for each of our state's dimensions the raw column it is, None for a zero.
      drop_first_step: the first step's action is empty.
      relabel_actions: dims 0..5 of the action become the change to the next state, and the last
        step goes.
      gripper: "look_ahead" makes it binary by `binarize_gripper`; "as_is" is absolute already.
      action_modes, state_modes: how to normalise each dimension (lara_jax.transforms).
      reasoning: where annotations lie, None where the dataset has none.
    """

    name: str
    robot: str
    source: str
    licence: str
    control_hz: float
    cameras: Mapping[str, str]
    default_views: tuple[str, ...]
    action_key: str = f"{STEPS}/action"
    state_key: str = f"{STEPS}/observation/state"
    language_key: str = f"{STEPS}/language_instruction"
    raw_action_dim: int = ACTION_DIM
    raw_state_dim: int
    action_encoding: str = "EEF_POS"
    absolute_action: tuple[bool, ...] = (False,) * 6 + (True,)
    state_encoding: str = "POS_EULER"
    state_columns: tuple[int | None, ...]
    drop_first_step: bool = False
    relabel_actions: bool = False
    gripper: Literal["as_is", "look_ahead"] = "as_is"
    action_modes: tuple[str, ...]
    state_modes: tuple[str, ...]
    reasoning: ReasoningKeys | None = None

    def __post_init__(self) -> None:
        self.camera_keys(self.default_views)
        if len(self.state_columns) != len(self.state_modes):
            raise ValueError(
                f"{self.name}: {len(self.state_columns)} state columns, "
                f"{len(self.state_modes)} modes"
            )
        if len(self.absolute_action) != len(self.action_modes):
            raise ValueError(
                f"{self.name}: {len(self.absolute_action)} action dims, "
                f"{len(self.action_modes)} modes"
            )

    def camera_keys(self, views: tuple[str, ...]) -> tuple[str, ...]:
        """Feature keys of the named views; a ValueError lists the views where one is unknown."""
        unknown = [view for view in views if view not in self.cameras]
        if unknown or not views:
            raise ValueError(
                f"dataset {self.name!r} has no view(s) {unknown}; it has: {', '.join(self.cameras)}"
            )
        return tuple(self.cameras[view] for view in views)


def standardize(
    spec: DatasetSpec, actions: np.ndarray, states: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brings one episode into our form and says which of its steps remain.

    Args:
      spec: the dataset.
      actions: float32[T, raw_action_dim], as stored.
      states: float32[T, raw_state_dim], as stored.

    Returns:
      actions float32[N, A]; states float32[N, J]; steps int64[N], the raw step each row was.

    Source: OpenVLA c8f03f4, prismatic/vla/datasets/rlds/oxe/transforms.py and utils/data_utils.py.
    """
    steps = np.arange(len(actions))
    if spec.gripper == "look_ahead":
        actions = np.concatenate([actions[:, :6], binarize_gripper(actions[:, 6])[:, None]], axis=1)
    if spec.drop_first_step:
        actions, states, steps = actions[1:], states[1:], steps[1:]
    if spec.relabel_actions:
        # Plain differences, as OpenVLA and Octo take them: an angle that wraps around makes a jump.
        motion = np.diff(states[:, :6], axis=0)
        actions = np.concatenate([motion, actions[:-1, 6:]], axis=1)
        states, steps = states[:-1], steps[:-1]
    zeros = np.zeros(len(states), np.float32)
    columns = [zeros if column is None else states[:, column] for column in spec.state_columns]
    return actions, np.stack(columns, axis=-1), steps


def binarize_gripper(positions: np.ndarray) -> np.ndarray:
    """Makes a gripper's commanded position binary by looking ahead.

    Above 0.95 it is open (1), below 0.05 closed (0); in between it is on its way to the next
    decided value, so it takes that: [1, 0.6, 0.3, 0] -> [1, 0, 0, 0]. A run that is undecided to
    the end keeps its last raw value, as in the source; the "binary" normalisation settles it.

    Args:
      positions: float32[T], 0 closed to 1 open.

    Returns:
      float32[T].

    Source: OpenVLA c8f03f4, prismatic/vla/datasets/rlds/utils/data_utils.py,
    binarize_gripper_actions.
    """
    result = np.empty_like(positions)
    ahead = positions[-1] if len(positions) else 0.0
    for step in reversed(range(len(positions))):
        if positions[step] > 0.95:
            ahead = 1.0
        elif positions[step] < 0.05:
            ahead = 0.0
        result[step] = ahead
    return result


_SPECS = (
    DatasetSpec(
        name="bridge_dataset",
        robot="WidowX 250, 6 degrees of freedom",
        source="BridgeData V2 (arXiv 2308.12952), the RLDS release at rail.eecs.berkeley.edu",
        licence="CC BY 4.0",
        control_hz=5.0,
        cameras={f"image_{i}": f"{STEPS}/observation/image_{i}" for i in range(4)},
        default_views=("image_0",),
        raw_state_dim=7,
        state_columns=(0, 1, 2, 3, 4, 5, None, 6),
        # As OpenVLA. Octo keeps the first step, whose action is zero; the rest is the same.
        drop_first_step=True,
        relabel_actions=True,
        gripper="look_ahead",
        action_modes=(*_MOTION, "binary"),
        state_modes=(*_MOTION, "q99", "binary"),
    ),
    DatasetSpec(
        name="lara_tabletop",
        robot="simulated arm of lara_jax.evals.tabletop",
        source="written by lara_jax",
        licence="Apache-2.0",
        control_hz=5.0,
        cameras={"image": f"{STEPS}/observation/image"},
        default_views=("image",),
        raw_state_dim=8,
        state_columns=tuple(range(8)),
        action_modes=(*_MOTION, "none"),
        state_modes=(*_MOTION, "q99", "none"),
        reasoning=ReasoningKeys(
            subtask=f"{STEPS}/reasoning/subtask",
            boxes=f"{STEPS}/reasoning/boxes",
            motion=f"{STEPS}/reasoning/motion",
        ),
    ),
)
REGISTRY: Mapping[str, DatasetSpec] = {spec.name: spec for spec in _SPECS}


def spec_named(name: str) -> DatasetSpec:
    """The registered dataset of this name; a ValueError lists all names where there is none."""
    if name not in REGISTRY:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name]
