"""Every dataset's raw schema, and what its steps must become, written out in plain NumPy.

Nothing here goes through the term language. A case gives the shape of each step feature (an int n
for float32[T, n], () for one number a step) and two functions of the raw features; sets that drop
or thin out rows, a third one that gives everything.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.data_pipelines.oxe.by_hand import (
    Raw,
    aloha_rows,
    bridge_rows,
    clipped,
    euler_angles,
    gnm_rows,
    inverted,
    looked_ahead,
    made_absolute,
    motion,
    no_state,
    pose_pad_gripper,
    rpt_rows,
    side_by_side,
    zeros,
)

STATE = "observation/state"
NATURAL = "observation/natural_language_instruction"
CLOSEDNESS = "action/gripper_closedness_action"
OXE = "_converted_externally_to_rlds"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Datasets with one raw schema and one standard form.

    Attributes:
      names: of the datasets.
      schema: shape of a step's value, by feature.
      action, state: from raw features to float32[T, A] and float32[T, J].
      rows: from actions, states and raw features to (actions, states, frame, next_frame); None
        where every step is a row.
      language: the feature with the words.
    """

    names: Sequence[str]
    schema: Mapping[str, Any]
    action: Callable[[Raw], np.ndarray]
    state: Callable[[Raw], np.ndarray]
    rows: Callable[[np.ndarray, np.ndarray, Raw], tuple[np.ndarray, ...]] | None = None
    language: str = "language_instruction"


RT1_ACTION = {"action/world_vector": 3, "action/rotation_delta": 3}
KUKA_POSE = "observation/clip_function_input/base_pose_tool_reached"
KUKA_GRIPPER = "observation/gripper_closed"
ROBOT_OBS = "observation/robot_obs"
JACO_POSE = "observation/end_effector_cartesian_pos"
MASK_POSE = "observation/end_effector_pose"
CASES = (
    Case(
        names=["fractal20220817_data"],
        schema={
            **RT1_ACTION,
            CLOSEDNESS: 1,
            "observation/base_pose_tool_reached": 7,
            "observation/gripper_closed": 1,
        },
        action=lambda r: side_by_side(motion(r), made_absolute(r[CLOSEDNESS][:, 0])),
        state=lambda r: side_by_side(
            r["observation/base_pose_tool_reached"], r["observation/gripper_closed"]
        ),
        language=NATURAL,
    ),
    Case(
        names=["kuka"],
        schema={**RT1_ACTION, CLOSEDNESS: 1, KUKA_POSE: "zlib 7", KUKA_GRIPPER: "zlib 1"},
        action=lambda r: side_by_side(motion(r), made_absolute(r[CLOSEDNESS][:, 0])),
        state=lambda r: side_by_side(r[KUKA_POSE], r[KUKA_GRIPPER]),
        language=NATURAL,
    ),
    Case(
        names=["bridge_oxe"],
        schema={**RT1_ACTION, "action/open_gripper": "bool", STATE: 7},
        action=lambda r: side_by_side(motion(r), r["action/open_gripper"]),
        state=pose_pad_gripper(STATE),
        rows=bridge_rows,
        language=NATURAL,
    ),
    Case(
        names=["bridge_orig", "bridge_dataset"],
        schema={"action": 7, STATE: 7},
        action=lambda r: side_by_side(r["action"][:, :6], looked_ahead(r["action"][:, 6])),
        state=pose_pad_gripper(STATE),
        rows=bridge_rows,
    ),
    Case(
        names=["taco_play"],
        schema={"action/rel_actions_world": 7, ROBOT_OBS: 15},
        action=lambda r: side_by_side(
            r["action/rel_actions_world"][:, :6], clipped(r["action/rel_actions_world"][:, 6])
        ),
        state=lambda r: side_by_side(
            r[ROBOT_OBS][:, :6], zeros(r[ROBOT_OBS], 1), r[ROBOT_OBS][:, 7]
        ),
        language=NATURAL,
    ),
    Case(
        names=["jaco_play"],
        schema={"action/world_vector": 3, CLOSEDNESS: 1, JACO_POSE: 7},
        action=lambda r: side_by_side(
            r["action/world_vector"], zeros(r[JACO_POSE], 3), made_absolute(r[CLOSEDNESS][:, 0])
        ),
        state=pose_pad_gripper(JACO_POSE),
        language=NATURAL,
    ),
    Case(
        names=["berkeley_cable_routing"],
        schema={**RT1_ACTION, "observation/robot_state": 7},
        action=lambda r: side_by_side(motion(r), zeros(motion(r), 1)),
        state=lambda r: side_by_side(r["observation/robot_state"], zeros(motion(r), 1)),
        language=NATURAL,
    ),
    Case(
        names=["roboturk"],
        schema={**RT1_ACTION, CLOSEDNESS: 1},
        action=lambda r: side_by_side(motion(r), inverted(clipped(r[CLOSEDNESS]))),
        state=no_state,
        language=NATURAL,
    ),
    Case(
        names=["nyu_door_opening_surprising_effectiveness"],
        schema={**RT1_ACTION, CLOSEDNESS: 1},
        action=lambda r: side_by_side(motion(r), made_absolute(r[CLOSEDNESS][:, 0])),
        state=no_state,
        language=NATURAL,
    ),
    Case(
        names=["viola"],
        schema={
            **RT1_ACTION,
            CLOSEDNESS: (),
            "observation/joint_states": 7,
            "observation/gripper_states": 1,
        },
        action=lambda r: side_by_side(motion(r), inverted(clipped(r[CLOSEDNESS]))),
        state=lambda r: side_by_side(
            r["observation/joint_states"], r["observation/gripper_states"]
        ),
        language=NATURAL,
    ),
    Case(
        names=["berkeley_autolab_ur5"],
        schema={**RT1_ACTION, CLOSEDNESS: (), "observation/robot_state": 15},
        action=lambda r: side_by_side(motion(r), made_absolute(r[CLOSEDNESS])),
        state=lambda r: r["observation/robot_state"][:, 6:14],
        language=NATURAL,
    ),
    Case(
        names=["toto"],
        schema={**RT1_ACTION, "action/open_gripper": "bool", STATE: 7},
        action=lambda r: side_by_side(motion(r), r["action/open_gripper"]),
        state=lambda r: side_by_side(r[STATE], zeros(r[STATE], 1)),
        language=NATURAL,
    ),
    Case(
        names=["language_table"],
        schema={
            "action": 2,
            "observation/effector_translation": 2,
            "observation/instruction": "code points 512",
        },
        action=lambda r: side_by_side(
            r["action"], zeros(r["action"], 4), zeros(r["action"], 1) + 1
        ),
        state=lambda r: side_by_side(r["observation/effector_translation"], zeros(r["action"], 6)),
        language="observation/instruction",
    ),
    Case(
        names=["columbia_cairlab_pusht_real"],
        schema={**RT1_ACTION, CLOSEDNESS: (), "observation/robot_state": 2},
        action=lambda r: side_by_side(motion(r), r[CLOSEDNESS]),
        state=lambda r: side_by_side(r["observation/robot_state"], zeros(motion(r), 6)),
        language=NATURAL,
    ),
    Case(
        names=["stanford_kuka_multimodal_dataset" + OXE],
        schema={"action": 4, "observation/ee_position": 3, "observation/ee_orientation": 4},
        action=lambda r: side_by_side(r["action"][:, :3], zeros(r["action"], 3), r["action"][:, 3]),
        state=lambda r: side_by_side(
            r["observation/ee_position"], r["observation/ee_orientation"], zeros(r["action"], 1)
        ),
    ),
    Case(
        names=["nyu_rot_dataset" + OXE, "stanford_robocook" + OXE],
        schema={"action": 7, STATE: 7},
        action=lambda r: r["action"],
        state=pose_pad_gripper(STATE),
    ),
    Case(
        names=["stanford_hydra_dataset" + OXE],
        schema={"action": 7, STATE: 27},
        action=lambda r: side_by_side(r["action"][:, :6], inverted(r["action"][:, 6])),
        state=lambda r: side_by_side(
            r[STATE][:, :3], r[STATE][:, 7:10], zeros(r[STATE], 1), r[STATE][:, 24]
        ),
    ),
    Case(
        names=["austin_buds_dataset" + OXE, "utaustin_mutex"],
        schema={"action": 7, STATE: 24},
        action=lambda r: side_by_side(r["action"][:, :6], inverted(clipped(r["action"][:, 6]))),
        state=lambda r: r[STATE][:, :8],
    ),
    Case(
        names=["nyu_franka_play_dataset" + OXE],
        schema={"action": 15, STATE: 13},
        action=lambda r: side_by_side(r["action"][:, 7:13], clipped(r["action"][:, 13])),
        state=lambda r: side_by_side(r[STATE][:, 7:], zeros(r[STATE], 2)),
    ),
    Case(
        names=["maniskill_dataset" + OXE],
        schema={"action": 7, "observation/tcp_pose": 7, STATE: 18},
        action=lambda r: r["action"],
        state=lambda r: side_by_side(r["observation/tcp_pose"], r[STATE][:, 7]),
    ),
    Case(
        names=["furniture_bench_dataset" + OXE],
        schema={"action": "quaternion 8", STATE: 35},
        action=lambda r: side_by_side(
            r["action"][:, :3],
            euler_angles(r["action"][:, 3:7]),
            inverted(clipped(r["action"][:, 7])),
        ),
        state=lambda r: side_by_side(r[STATE][:, :7], r[STATE][:, 34]),
    ),
    Case(
        names=["cmu_franka_exploration_dataset" + OXE],
        schema={"action": 8},
        action=lambda r: r["action"][:, :7],
        state=no_state,
    ),
    Case(
        names=["ucsd_kitchen_dataset" + OXE],
        schema={"action": 8, STATE: 21},
        action=lambda r: r["action"][:, :7],
        state=lambda r: side_by_side(r[STATE][:, :7], zeros(r[STATE], 1)),
    ),
    Case(
        names=["ucsd_pick_and_place_dataset" + OXE],
        schema={"action": 4, STATE: 7},
        action=lambda r: side_by_side(r["action"][:, :3], zeros(r["action"], 3), r["action"][:, 3]),
        state=pose_pad_gripper(STATE),
    ),
    Case(
        names=["austin_sailor_dataset" + OXE, "austin_sirius_dataset" + OXE],
        schema={"action": 7, STATE: 8},
        action=lambda r: side_by_side(r["action"][:, :6], inverted(clipped(r["action"][:, 6]))),
        state=lambda r: r[STATE],
    ),
    Case(
        names=["bc_z"],
        schema={
            "action/future/xyz_residual": 30,
            "action/future/axis_angle_residual": 30,
            "action/future/target_close": "integers 10",
            "observation/present/xyz": 3,
            "observation/present/axis_angle": 3,
            "observation/present/sensed_close": 1,
        },
        action=lambda r: side_by_side(
            r["action/future/xyz_residual"][:, :3],
            r["action/future/axis_angle_residual"][:, :3],
            1 - r["action/future/target_close"][:, 0].astype(np.float32),
        ),
        state=lambda r: side_by_side(
            r["observation/present/xyz"],
            r["observation/present/axis_angle"],
            zeros(r["observation/present/xyz"], 1),
            r["observation/present/sensed_close"],
        ),
        language=NATURAL,
    ),
    Case(
        names=["utokyo_pr2_opening_fridge" + OXE, "utokyo_pr2_tabletop_manipulation" + OXE],
        schema={"action": 8, STATE: 7},
        action=lambda r: r["action"][:, :7],
        state=pose_pad_gripper(STATE),
    ),
    Case(
        names=["utokyo_xarm_pick_and_place" + OXE],
        schema={"action": 7, "observation/end_effector_pose": 6},
        action=lambda r: r["action"],
        state=lambda r: side_by_side(r["observation/end_effector_pose"], zeros(r["action"], 2)),
    ),
    Case(
        names=["utokyo_xarm_bimanual" + OXE],
        schema={"action": 14, "observation/pose_r": 6},
        action=lambda r: r["action"][:, 7:],
        state=lambda r: side_by_side(r["observation/pose_r"], zeros(r["action"], 2)),
    ),
    Case(
        names=["robo_net"],
        schema={"action": 5, STATE: 5},
        action=lambda r: side_by_side(r["action"][:, :4], zeros(r["action"], 2), r["action"][:, 4]),
        state=lambda r: side_by_side(r[STATE][:, :4], zeros(r[STATE], 3), r[STATE][:, 4]),
    ),
    Case(
        names=["berkeley_mvp" + OXE],
        schema={"action": 8, "observation/pose": 7, "observation/gripper": "bool"},
        action=lambda r: side_by_side(r["action"][:, :7], inverted(r["action"][:, 7])),
        state=lambda r: side_by_side(r["observation/pose"], r["observation/gripper"]),
    ),
    Case(
        names=["berkeley_rpt" + OXE],
        schema={"action": 8, "observation/joint_pos": 7, "observation/gripper": "bool"},
        action=lambda r: side_by_side(r["action"][:, :7], inverted(r["action"][:, 7])),
        state=lambda r: side_by_side(r["observation/joint_pos"], r["observation/gripper"]),
        rows=rpt_rows,
    ),
    Case(
        names=["kaist_nonprehensile" + OXE],
        schema={"action": 20, STATE: 21},
        action=lambda r: side_by_side(r["action"][:, :6], zeros(r["action"], 1)),
        state=lambda r: side_by_side(r[STATE][:, 14:], zeros(r[STATE], 1)),
    ),
    Case(
        names=["stanford_mask_vit" + OXE],
        schema={"action": 5, MASK_POSE: 5},
        action=lambda r: side_by_side(r["action"][:, :4], zeros(r["action"], 2), r["action"][:, 4]),
        state=lambda r: side_by_side(
            r[MASK_POSE][:, :4], zeros(r["action"], 3), r[MASK_POSE][:, 4]
        ),
    ),
    Case(
        names=["tokyo_u_lsmo" + OXE],
        schema={"action": 7, STATE: 13},
        action=lambda r: r["action"],
        state=pose_pad_gripper(STATE),
    ),
    Case(
        names=["dlr_sara_pour" + OXE],
        schema={"action": 7, STATE: 6},
        action=lambda r: r["action"],
        state=lambda r: side_by_side(r[STATE], zeros(r[STATE], 2)),
    ),
    Case(
        names=["dlr_sara_grid_clamp" + OXE],
        schema={"action": 7, STATE: 12},
        action=lambda r: r["action"],
        state=lambda r: side_by_side(r[STATE][:, :6], zeros(r[STATE], 2)),
    ),
    Case(
        names=["dlr_edan_shared_control" + OXE],
        schema={"action": 7, STATE: 7},
        action=lambda r: side_by_side(r["action"][:, :6], inverted(r["action"][:, 6])),
        state=lambda r: side_by_side(r[STATE], zeros(r[STATE], 1)),
    ),
    Case(
        names=["asu_table_top" + OXE],
        schema={"action": 7, "ground_truth_states/EE": 6, STATE: 7},
        action=lambda r: r["action"],
        state=lambda r: side_by_side(
            r["ground_truth_states/EE"], zeros(r[STATE], 1), r[STATE][:, 6]
        ),
    ),
    Case(
        names=["imperialcollege_sawyer_wrist_cam"],
        schema={"action": 8, STATE: 1},
        action=lambda r: r["action"][:, :7],
        state=lambda r: side_by_side(zeros(r[STATE], 7), r[STATE]),
    ),
    Case(
        names=["iamlab_cmu_pickup_insert" + OXE],
        schema={"action": "quaternion 8", STATE: 20},
        action=lambda r: side_by_side(
            r["action"][:, :3], euler_angles(r["action"][:, 3:7]), r["action"][:, 7]
        ),
        state=lambda r: r[STATE][:, :8],
    ),
    Case(
        names=["uiuc_d3field"],
        schema={"action": 3},
        action=lambda r: side_by_side(r["action"], zeros(r["action"], 4)),
        state=no_state,
    ),
    Case(
        names=["berkeley_fanuc_manipulation"],
        schema={"action": 6, STATE: 13},
        action=lambda r: side_by_side(r["action"], inverted(r[STATE][:, 6])),
        state=lambda r: side_by_side(r[STATE][:, :6], zeros(r[STATE], 1), r[STATE][:, 6]),
    ),
    Case(
        names=["cmu_playing_with_food"],
        schema={"action": "quaternion 9", STATE: 6},
        action=lambda r: side_by_side(
            r["action"][:, :3], euler_angles(r["action"][:, 3:7]), r["action"][:, 8]
        ),
        state=lambda r: side_by_side(r[STATE], zeros(r[STATE], 2)),
    ),
    Case(
        names=["cmu_play_fusion"],
        schema={"action": 9, STATE: 8},
        action=lambda r: r["action"][:, [0, 1, 2, 5, 6, 7, 8]],
        state=lambda r: r[STATE],
    ),
    Case(
        names=["cmu_stretch"],
        schema={"action": 8, STATE: 4},
        action=lambda r: r["action"][:, :7],
        state=lambda r: side_by_side(r[STATE][:, :3], zeros(r[STATE], 4), r[STATE][:, 3]),
    ),
    Case(
        names=["berkeley_gnm_recon", "berkeley_gnm_cory_hall", "berkeley_gnm_sac_son"],
        schema={"action": 2, "observation/position": 2, "observation/yaw": 1},
        action=lambda r: side_by_side(r["action"], zeros(r["action"], 5)),
        state=lambda r: side_by_side(
            r["observation/position"],
            zeros(r["action"], 3),
            r["observation/yaw"],
            zeros(r["action"], 2),
        ),
    ),
    Case(
        names=["droid", "droid_wipe"],
        schema={
            "action_dict/cartesian_velocity": 6,
            "action_dict/gripper_position": 1,
            "observation/cartesian_position": 6,
            "observation/gripper_position": 1,
        },
        action=lambda r: side_by_side(
            r["action_dict/cartesian_velocity"], inverted(r["action_dict/gripper_position"])
        ),
        state=lambda r: side_by_side(
            r["observation/cartesian_position"], r["observation/gripper_position"]
        ),
    ),
    Case(
        names=["fmb_dataset"],
        schema={"action": 7, "observation/eef_pose": 7, "observation/state_gripper_pose": ()},
        action=lambda r: r["action"],
        state=lambda r: side_by_side(
            r["observation/eef_pose"], r["observation/state_gripper_pose"]
        ),
    ),
    Case(
        names=["dobbe"],
        schema={"action": 7, STATE: 7},
        action=lambda r: r["action"],
        state=lambda r: r[STATE],
    ),
    Case(
        names=["roboset"],
        schema={"action": 8, STATE: 8},
        action=lambda r: side_by_side(r["action"][:, :7], inverted(clipped(r["action"][:, 7]))),
        state=lambda r: r[STATE],
    ),
    Case(
        names=["rh20t"],
        schema={
            "action/tcp_base": 6,
            "action/gripper": (),
            "observation/tcp_base": 6,
            "observation/gripper_width": (),
        },
        action=lambda r: side_by_side(r["action/tcp_base"], r["action/gripper"]),
        state=lambda r: side_by_side(r["observation/tcp_base"], r["observation/gripper_width"]),
    ),
    Case(
        names=[
            "tdroid_carrot_in_bowl",
            "tdroid_pour_corn_in_pot",
            "tdroid_flip_pot_upright",
            "tdroid_move_object_onto_plate",
            "tdroid_knock_object_over",
            "tdroid_cover_object_with_towel",
        ],
        schema={
            "action": 7,
            "observation/cartesian_position": 6,
            "observation/gripper_position": 1,
        },
        action=lambda r: side_by_side(r["action"][:, :6], looked_ahead(r["action"][:, 6])),
        state=lambda r: side_by_side(
            r["observation/cartesian_position"],
            zeros(r["action"], 1),
            r["observation/gripper_position"],
        ),
    ),
    Case(
        names=[
            "libero_spatial_no_noops",
            "libero_object_no_noops",
            "libero_goal_no_noops",
            "libero_10_no_noops",
        ],
        schema={"action": 7, STATE: 8},
        action=lambda r: side_by_side(r["action"][:, :6], inverted(clipped(r["action"][:, 6]))),
        state=lambda r: side_by_side(r[STATE][:, :6], zeros(r[STATE], 1), r[STATE][:, 6:]),
    ),
    Case(
        names=["gnm_dataset"],
        schema={"action": 2, "observation/position": 2, "observation/yaw": 1, STATE: 3},
        action=lambda r: r["action"],
        state=lambda r: r[STATE],
        rows=gnm_rows,
    ),
    Case(
        names=["aloha_static_dataset", "aloha_dagger_dataset"],
        schema={"action": 14, STATE: 14},
        action=lambda r: r["action"],
        state=lambda r: r[STATE],
        rows=aloha_rows,
    ),
    Case(
        names=["aloha_mobile_dataset"],
        schema={"action": 16, STATE: 14},
        action=lambda r: r["action"],
        state=lambda r: r[STATE],
        rows=aloha_rows,
    ),
    Case(
        names=["mujoco_manip"],
        schema={"action": 7},
        action=lambda r: side_by_side(r["action"][:, :6], 1 - r["action"][:, 6] / 255),
        state=no_state,
    ),
    Case(
        names=["lara_tabletop"],
        schema={"action": 7, STATE: 8},
        action=lambda r: r["action"],
        state=lambda r: r[STATE],
    ),
)
BY_NAME: Mapping[str, Case] = {name: case for case in CASES for name in case.names}

# What grippers are told, over the thresholds of every family: opens, closes, half way, nothing.
GRIPPER = (0, 0.06, -1, 0.5, 0.97, 1, 1.2, 0.3, 0.04, 0, 0.08, 0.6, 0.2)


def made_episode(case: Case, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """An episode of 13 random steps, every last column as a gripper's.

    Returns:
      The numbers of each feature, and the raw features as a record holds them.
    """
    random, steps = np.random.default_rng(seed), len(GRIPPER)
    numbers: dict[str, np.ndarray] = {}
    raw: dict[str, Any] = {}
    for key, shape in case.schema.items():
        kind, _, width = shape.partition(" ") if isinstance(shape, str) else ("", "", shape)
        if key == case.language:  # code points
            texts = np.zeros((steps, 512), np.int32)
            for step in range(steps):
                points = [ord(letter) for letter in f"push {step} à gauche"]
                texts[step, : len(points)] = points
            raw[key] = texts
            continue
        if kind == "bool":
            values = np.array(GRIPPER) > 0.4
        elif kind == "integers":
            values = random.integers(0, 2, (steps, int(width)))
        elif shape == ():
            values = np.array(GRIPPER, np.float32)
        else:
            values = random.normal(size=(steps, int(width))).astype(np.float32)
            values[:, -1] = GRIPPER
        if kind == "quaternion":
            values[:, 3:7] /= np.linalg.norm(values[:, 3:7], axis=1, keepdims=True)
        numbers[key] = values.astype(np.float32)
        raw[key] = [zlib.compress(row.tobytes()) for row in values] if kind == "zlib" else values
    if case.language not in raw:
        raw[case.language] = [f"push {step} à gauche".encode() for step in range(steps)]
    return numbers, raw
