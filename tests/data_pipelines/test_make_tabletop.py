"""`lara data make-tabletop`: the schema, the annotations, bytes by the seed alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

pytest.importorskip("mujoco")

from data_pipelines.cli import main
from data_pipelines.make_tabletop import CollectConfig, demonstrate, make_dataset
from data_pipelines.rlds.directory import Directory
from data_pipelines.rlds.source import RldsSource
from lara_jax.evals.tabletop import TabletopConfig, TabletopEnv
from tests.data_pipelines.protobuf_reader import Example, read_split

SMALL = TabletopConfig(image_size_px=32)
FILES = {
    "dataset_info.json",
    "features.json",
    "lara_tabletop-train.tfrecord-00000-of-00001",
    "lara_tabletop-val.tfrecord-00000-of-00001",
}
STEP_FEATURES = {
    "observation/image": ((32, 32, 3), "uint8"),
    "observation/state": ((8,), "float32"),
    "action": ((7,), "float32"),
    "language_instruction": ((), "string"),
    "is_first": ((), "bool"),
    "is_last": ((), "bool"),
    "is_terminal": ((), "bool"),
    "reward": ((), "float32"),
    "discount": ((), "float32"),
    "reasoning/subtask": ((), "string"),
    "reasoning/boxes": ((2, 4), "float32"),
    "reasoning/motion": ((), "string"),
}


@pytest.fixture(scope="module")
def version_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    return make_dataset(out, CollectConfig(tabletop=SMALL), episodes=3, val_episodes=1).path


@pytest.fixture(scope="module")
def first(version_directory: Path) -> Example:
    """The first training episode."""
    return read_split(Directory.read(version_directory), "train")[0]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_schema(version_directory: Path) -> None:
    assert version_directory.parts[-2:] == ("lara_tabletop", "1.0.0")
    directory = Directory.read(version_directory)
    found = {key: (f.shape, f.dtype) for key, f in directory.features.items() if f.per_step}
    assert found == {f"steps/{key}": value for key, value in STEP_FEATURES.items()}
    assert set(directory.features) - set(found) == {
        "episode_metadata/file_path",
        "episode_metadata/family",
        "episode_metadata/success",
    }
    splits = tfds.builder_from_directory(version_directory).info.splits
    assert {name: split.num_examples for name, split in splits.items()} == {"train": 3, "val": 1}


def test_steps_hang_together(first: Example) -> None:
    steps = len(first.array("steps/action"))
    assert steps > 10
    assert first.array("steps/is_first").tolist() == [True] + [False] * (steps - 1)
    assert first.array("steps/is_last").tolist() == [False] * (steps - 1) + [True]
    assert first.array("steps/is_terminal")[-1] and first.array("episode_metadata/success")
    assert first.array("steps/discount").tolist() == [1.0] * (steps - 1) + [0.0]
    reward = first.array("steps/reward")
    assert reward[0] == 0 and reward[-1] == 1
    assert len(set(first.text("steps/language_instruction"))) == 1
    state, action = first.array("steps/observation/state"), first.array("steps/action")
    # Most steps are not disturbed: there the gripper goes where the action says.
    error = np.abs(state[1:, :3] - state[:-1, :3] - action[:-1, :3]).max(axis=1)
    assert np.median(error) < 5e-3
    assert set(action[:, 6]) == {0.0, 1.0}


def test_annotations(first: Example) -> None:
    _, _, block, _, _, _, plate, _ = first.text("steps/language_instruction")[0].split()
    subtasks, motions = first.text("steps/reasoning/subtask"), first.text("steps/reasoning/motion")
    assert subtasks[0] == f"move to the {block} block" and subtasks[-1] == "retreat"
    assert f"lower onto the {plate} plate" in subtasks
    closing = subtasks.index(f"grasp the {block} block")
    assert motions[closing] == "Close the gripper."
    boxes = first.array("steps/reasoning/boxes")
    x1, y1, x2, y2 = boxes[np.isfinite(boxes).all(axis=-1)].T
    assert (x1 >= 0).all() and (x1 < x2).all() and (x2 <= 1).all()
    assert (y1 >= 0).all() and (y1 < y2).all() and (y2 <= 1).all()
    assert np.isfinite(boxes[0]).all()


def test_the_recorded_action_is_the_experts_also_where_it_was_disturbed() -> None:
    env = TabletopEnv(SMALL)
    records = demonstrate(env, CollectConfig(tabletop=SMALL, disturb_probability=1.0), 5)
    assert records is not None
    for record in records:  # the expert never moves faster than this, the noise does
        assert np.abs(record.expert.action[:3]).max() <= np.float32(0.035)
    states = np.stack([record.observation["state"][:3] for record in records])
    moved = np.diff(states, axis=0) - np.stack([r.expert.action[:3] for r in records[:-1]])
    assert 0.006 < moved.std() < 0.02


def test_failed_episodes_are_left_out_and_counted(tmp_path: Path) -> None:
    def attempt(max_steps: int, out: str) -> tuple[int, int]:
        config = CollectConfig(tabletop=TabletopConfig(image_size_px=16, max_steps=max_steps))
        summary = make_dataset(tmp_path / out, config, episodes=6, val_episodes=2)
        return summary.train_episodes + summary.val_episodes, summary.failed_episodes

    assert attempt(60, "all") == (8, 0)
    written, failed = attempt(22, "some")
    assert written + failed == 8 and failed > 0
    with pytest.raises(ValueError, match="'train' of lara_tabletop has no episode"):
        attempt(2, "none")


def test_seed_changes_everything_and_splits_differ(version_directory: Path, tmp_path: Path) -> None:
    config = CollectConfig(tabletop=SMALL, seed=1)
    other = make_dataset(tmp_path, config, episodes=3, val_episodes=3).path
    train, val = (
        contents(other)[f"lara_tabletop-{s}.tfrecord-00000-of-00001"] for s in ("train", "val")
    )
    assert train != val
    assert train != contents(version_directory)["lara_tabletop-train.tfrecord-00000-of-00001"]


def test_command_with_four_workers_writes_the_same_bytes(
    version_directory: Path, tmp_path: Path, repository: Path
) -> None:
    code = "import sys; from data_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--out", str(tmp_path), "--episodes", "3", "--val-episodes", "1"]
    options = ["--image-size", "32", "--workers", "4", "--json"]
    result = subprocess.run(
        [sys.executable, "-c", code, "make-tabletop", *arguments, *options],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    summary = json.loads(result.stdout)
    assert Path(summary["path"]).name == "1.0.0"
    assert (summary["train_episodes"], summary["val_episodes"]) == (3, 1)
    assert summary["failed_episodes"] == 0 and summary["steps"] > 40
    written = contents(Path(summary["path"]))
    assert set(written) == FILES
    assert written == contents(version_directory)


def test_families_take_turns_and_both_cameras_are_written(tmp_path: Path) -> None:
    arguments = ["make-tabletop", "--out", str(tmp_path), "--episodes", "4", "--val-episodes", "1"]
    options = ["--families", "stack,two_stage", "--cameras", "primary,wrist", "--size", "16"]
    assert main([*arguments, *options]) == 0
    path = tmp_path / "lara_tabletop" / "1.0.0"
    directory = Directory.read(path)
    for key in ("image", "wrist_image"):
        assert directory.feature(f"steps/observation/{key}").shape == (16, 16, 3)
    records = read_split(directory, "train")
    families = [record.text("episode_metadata/family")[0] for record in records]
    assert families == ["stack", "two_stage"] * 2
    said = [record.text("steps/language_instruction")[0] for record in records]
    assert all(text.startswith("stack the ") for text in said[::2])
    assert not any(text.startswith("stack the ") for text in said[1::2])
    boxes = records[1].array("steps/reasoning/boxes")
    subtasks = records[1].text("steps/reasoning/subtask")
    moved = {text.split(" the ")[1] for text in subtasks if text.startswith("grasp")}
    assert len(moved) == 2 and boxes.shape == (len(subtasks), 2, 4)  # two blocks, one at a time
    source = RldsSource.read(path, "train")
    assert source.cameras == ("image", "wrist_image")
    assert source.spec.roles == {"primary": "image", "wrist": "wrist_image"}


def test_command_prints_the_path_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["make-tabletop", "--out", str(tmp_path), "--episodes", "1", "--image-size", "16"]
    assert main(arguments) == 0
    path = capsys.readouterr().out.splitlines()[-1]
    assert set(contents(Path(path))) == FILES
    with pytest.raises(ValueError, match="exists"):
        main(arguments)
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--episodes", "0"), "episodes must be at least 1, got 0"),
        (("--val-episodes", "0"), "val_episodes must be at least 1, got 0"),
        (("--workers", "0"), "workers must be at least 1, got 0"),
        (("--seed", "-1"), "seed must not be negative"),
        (("--image-size", "4"), "at least 16"),
        (("--families", "place,sweep"), "families: unknown 'sweep', allowed: place, stack"),
        (("--families", "stack,stack"), "families must be one or more different names"),
        (("--cameras", "primary,ceiling"), "cameras: unknown 'ceiling', allowed: primary, wrist"),
        (("--cameras", "wrist"), "the first of cameras must be primary"),
    ],
)
def test_command_refuses(tmp_path: Path, option: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["make-tabletop", "--out", str(tmp_path), "--episodes", "1", *option])


def test_unknown_verbs_exit_with_2() -> None:
    with pytest.raises(SystemExit) as error:
        main(["fry"])
    assert error.value.code == 2
