"""Small LeRobot data sets as LeRobot lays them out, for tests; every frame says which one it is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.lerobot.layouts import LAYOUTS
from tests.data_pipelines.lerobot.videos import HEIGHT, WIDTH, write_video

FPS = 5
LENGTHS = (14, 9, 20, 11)
TASKS = ("put the spoon on the towel", "", "close the drawer", "stack the cubes")
BRIDGE = ("observation.images.image_0",)
LIBERO = ("observation.images.image", "observation.images.wrist_image")
POSE = ("x", "y", "z", "roll", "pitch", "yaw")
V2_PATHS = {
    "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
}
V3_PATHS = {
    "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
    "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
# v3.0: the episodes of each data file and of each video file, which need not agree.
DATA_FILES, VIDEO_FILES = ((0, 1, 2), (3,)), ((0, 1), (2, 3))


def with_left_out(numbers: Sequence[int]) -> dict[int, str]:
    """TASKS under these numbers, and others under those that LaRA-VLA's Bridge set leaves out."""
    others = LAYOUTS["bridge_lara"].without_tasks - set(numbers)
    return dict(zip(numbers, TASKS, strict=True)) | {task: f"task {task}" for task in others}


def number(episode: int, step: int, camera: int) -> int:
    """What the barcode of a frame says."""
    return sum(LENGTHS[:episode]) + step + 128 * camera


def actions(episode: int) -> np.ndarray:
    """float32[T, 7]."""
    random = np.random.default_rng(episode)
    values = random.normal(size=(LENGTHS[episode], 7)).astype(np.float32)
    values[:, 6] = random.integers(0, 2, LENGTHS[episode])
    return values


def states(episode: int) -> np.ndarray:
    """float32[T, 8]."""
    return (
        np.random.default_rng(100 + episode).normal(size=(LENGTHS[episode], 8)).astype(np.float32)
    )


def modality(cameras: Mapping[str, str], state: Sequence[str], action: Sequence[str]) -> Any:
    """meta/modality.json: entries in this order, one number each."""

    def entries(names: Sequence[str]) -> dict[str, Any]:
        return {name: {"start": at, "end": at + 1} for at, name in enumerate(names)}

    return {
        "state": entries(state),
        "action": entries(action),
        "video": {name: {"original_key": key} for name, key in cameras.items()},
        "annotation": {"human.action.task_description": {"original_key": "task_index"}},
    }


BRIDGE_MODALITY = modality({"image_0": BRIDGE[0]}, (*POSE, "pad", "gripper"), (*POSE, "gripper"))
LIBERO_MODALITY = modality(
    {"primary_image": LIBERO[0], "wrist_image": LIBERO[1]},
    (*POSE, "pad", "gripper"),
    (*POSE, "gripper"),
)


def write_set(
    root: Path,
    *,
    version: str = "v2.1",
    cameras: Sequence[str] = BRIDGE,
    tasks: Mapping[int, str] = dict(enumerate(TASKS)),
    modality: Any = None,
    robot: str = "widowx",
    info: Mapping[str, Any] | None = None,
    gop: int = 6,
) -> Path:
    """A data set of 4 episodes; episode i has the i-th of `tasks`."""
    v3 = version == "v3.0"
    vector = {"dtype": "float32", "names": {"motors": ["dx", "dy"]}}
    features: dict[str, Any] = {
        "observation.state": vector | {"shape": [8]},
        "action": vector | {"shape": [7]},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{
            key: {"dtype": "int64", "shape": [1], "names": None}
            for key in ("frame_index", "episode_index", "index", "task_index")
        },
        **{
            key: {
                "dtype": "video",
                "shape": [HEIGHT, WIDTH, 3],
                "names": ["height", "width", "rgb"],
            }
            for key in cameras
        },
    }
    facts = {
        "codebase_version": version,
        "robot_type": robot,
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "fps": FPS,
        "splits": {"train": "0:3", "valid": "3:4", "train_valid": "0:4"},
        "features": features,
        **(V3_PATHS if v3 else V2_PATHS),
    }
    (root / "meta").mkdir(parents=True)
    write_json(root / "meta/info.json", facts | dict(info or {}))
    if modality:
        write_json(root / "meta/modality.json", modality)
    indices = list(tasks)
    rows = [_rows(episode, indices[episode]) for episode in range(len(LENGTHS))]
    (_write_v3 if v3 else _write_v2)(root, cameras, tasks, rows, gop)
    return root


def _rows(episode: int, task: int) -> dict[str, Any]:
    """The columns of an episode."""
    length = LENGTHS[episode]
    step = np.arange(length)
    return {
        "observation.state": list(states(episode)),
        "action": list(actions(episode)),
        "timestamp": (step / FPS).astype(np.float32),
        "frame_index": step,
        "episode_index": np.full(length, episode),
        "index": sum(LENGTHS[:episode]) + step,
        "task_index": np.full(length, task),
    }


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A data file of these episodes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables([pa.table(dict(episode)) for episode in rows]), path)


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_v2(
    root: Path, cameras: Sequence[str], tasks: Mapping[int, str], rows: Sequence[Any], gop: int
) -> None:
    write_jsonl(
        root / "meta/tasks.jsonl", ({"task_index": i, "task": text} for i, text in tasks.items())
    )
    texts = list(tasks.values())
    write_jsonl(
        root / "meta/episodes.jsonl",
        (
            {"episode_index": e, "tasks": [texts[e]], "length": length}
            for e, length in enumerate(LENGTHS)
        ),
    )
    for episode, columns in enumerate(rows):
        place = {"episode_chunk": 0, "episode_index": episode}
        write_rows(root / V2_PATHS["data_path"].format(**place), [columns])
        for camera, key in enumerate(cameras):
            numbers = [number(episode, step, camera) for step in range(LENGTHS[episode])]
            file = root / V2_PATHS["video_path"].format(video_key=key, **place)
            write_video(file, numbers, fps=FPS, gop=gop)


def _write_v3(
    root: Path, cameras: Sequence[str], tasks: Mapping[int, str], rows: Sequence[Any], gop: int
) -> None:
    # As pandas writes a table whose index, the texts, has no name.
    table = pa.table({"task_index": list(tasks), "__index_level_0__": list(tasks.values())})
    pq.write_table(table, root / "meta/tasks.parquet")
    texts = list(tasks.values())
    listed = [
        {
            "episode_index": e,
            "tasks": [texts[e]],
            "length": length,
            "dataset_from_index": sum(LENGTHS[:e]),
            "dataset_to_index": sum(LENGTHS[: e + 1]),
            "stats/action/mean": [0.0] * 7,
        }
        for e, length in enumerate(LENGTHS)
    ]
    for file, episodes in enumerate(DATA_FILES):
        place = {"chunk_index": 0, "file_index": file}
        write_rows(root / V3_PATHS["data_path"].format(**place), [rows[e] for e in episodes])
        for e in episodes:
            listed[e] |= {f"data/{key}": value for key, value in place.items()}
    for camera, key in enumerate(cameras):
        for file, episodes in enumerate(VIDEO_FILES):
            place = {"chunk_index": 0, "file_index": file}
            numbers: list[int] = []
            for e in episodes:
                listed[e] |= {f"videos/{key}/{name}": value for name, value in place.items()}
                listed[e][f"videos/{key}/from_timestamp"] = len(numbers) / FPS
                numbers += [number(e, step, camera) for step in range(LENGTHS[e])]
                listed[e][f"videos/{key}/to_timestamp"] = len(numbers) / FPS
            path = root / V3_PATHS["video_path"].format(video_key=key, **place)
            write_video(path, numbers, fps=FPS, gop=gop)
    # Two files of episodes, the later ones first: order and number of files mean nothing.
    for file, part in enumerate((listed[2:], listed[:2])):
        path = root / f"meta/episodes/chunk-000/file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), path)


def write_annotations(root: Path, captions: str, boxes: str) -> None:
    """LaRA-VLA's two files, of episodes 0 and 2."""
    write_jsonl(
        root / "annotations" / captions,
        (
            {
                "episode_index": e,
                "steps": {
                    str(step): {
                        "subtask": f"subtask {e}.{step}",
                        "reasoning": f"motion {e}.{step}",
                        "gripper_state": None,
                    }
                    for step in range(LENGTHS[e])
                },
            }
            for e in (0, 2)
        ),
    )
    write_jsonl(
        root / "annotations" / boxes,
        (
            {
                "episode_index": e,
                "num_steps": LENGTHS[e],
                "dense_labels": {
                    "active_bbox": [None, *[[0.25, 0.25, 0.5, 0.75]] * (LENGTHS[e] - 1)],
                    "active_bbox2": [None, *[[0.5, 0.0, 1.0, 0.25]] * (LENGTHS[e] - 1)],
                },
            }
            for e in (0, 2)
        ),
    )


def write_bridge(root: Path, **settings: Any) -> Path:
    """As the authors' Bridge set."""
    write_set(root, modality=BRIDGE_MODALITY, **settings)
    write_annotations(
        root,
        "episode_dense_captions_full_final.jsonl",
        "episode_sam3_bboxes_final_merged.jsonl",
    )
    return root


def write_libero(root: Path, **settings: Any) -> Path:
    """As one suite of the authors' LIBERO set."""
    write_set(root, cameras=LIBERO, modality=LIBERO_MODALITY, robot="panda", **settings)
    write_annotations(
        root, "episode_dense_captions_full.jsonl", "episode_sam3_bboxes_from_dino_final.jsonl"
    )
    return root
