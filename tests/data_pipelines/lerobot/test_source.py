"""LeRobot data sets through the index: numbers, words, annotations and frames, in both layouts."""

import itertools
import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.frames import FrameReader
from data_pipelines.index import cli
from data_pipelines.index.build import index_source
from data_pipelines.index.format import Index
from data_pipelines.lerobot import is_lerobot
from data_pipelines.lerobot import source as source_module
from data_pipelines.lerobot.layouts import LAYOUTS
from data_pipelines.lerobot.meta import Metadata
from data_pipelines.lerobot.source import LeRobotSource
from data_pipelines.oxe.registry import load_definitions
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.lerobot import sets
from tests.data_pipelines.lerobot.sets import LENGTHS, TASKS
from tests.data_pipelines.lerobot.videos import damage_packet, number_of, write_video

VERSIONS = ("v2.0", "v2.1", "v3.0")


def index_of(source: LeRobotSource, folder: Path) -> Index:
    return index_source(source, folder, workers=1)


@pytest.fixture(scope="module", params=VERSIONS)
def bridge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param) / "bridge_orig_lerobot"
    return sets.write_bridge(root, version=request.param)


@pytest.fixture(scope="module")
def bridge_index(bridge: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return index_of(LeRobotSource.read(bridge), tmp_path_factory.mktemp("index") / "train")


def test_the_numbers_and_words_of_each_row(bridge_index: Index) -> None:
    index, rows = bridge_index, sum(LENGTHS[:3])
    assert (len(index), len(index.episodes), index.spec.control_hz) == (rows, 3, 5.0)
    expected = np.concatenate([sets.actions(e) for e in range(3)])
    np.testing.assert_array_equal(index.actions, expected)
    np.testing.assert_array_equal(index.states, np.concatenate([sets.states(e) for e in range(3)]))
    assert [index.instruction(row) for row in range(rows)] == [
        TASKS[e] for e in range(3) for _ in range(LENGTHS[e])
    ]
    assert index.header.counts["flag:no_language"] == LENGTHS[1]
    assert [index.key(e) for e in range(3)] == [f"episode_{e:06d}" for e in range(3)]
    assert index.episodes["record"].tolist() == [0, 1, 2]


def test_every_frame_is_the_one_of_its_row(bridge_index: Index) -> None:
    reader = FrameReader(bridge_index)
    frames = [(e, step) for e in range(3) for step in range(LENGTHS[e])]
    random.Random(0).shuffle(frames)
    for episode, step in frames:
        frame = int(bridge_index.episodes[episode]["first_frame"]) + step
        assert number_of(reader.image("image_0", frame)) == sets.number(episode, step, 0)


def test_annotations_meet_their_steps(bridge_index: Index) -> None:
    first = [bridge_index.annotation(row) for row in (0, 1, LENGTHS[0] - 1)]
    boxes = ((0.25, 0.25, 0.5, 0.75), (0.5, 0.0, 1.0, 0.25))
    assert first == [
        Annotation(subtask="subtask 0.0", motion="motion 0.0"),
        Annotation(subtask="subtask 0.1", motion="motion 0.1", boxes=boxes),
        Annotation(subtask="subtask 0.13", motion="motion 0.13", boxes=boxes),
    ]
    assert bridge_index.annotation(LENGTHS[0]) is None
    assert bridge_index.header.counts["flag:no_annotation"] == LENGTHS[1]
    assert bridge_index.header.annotations["fingerprint"].startswith("lara:")


def test_the_layouts_of_the_release(bridge_index: Index, tmp_path: Path) -> None:
    spec = bridge_index.spec
    assert (spec.name, spec.action_modes[0], spec.action_modes[6]) == (
        "bridge_lara",
        "q99",
        "binary",
    )
    assert spec.state_modes == ("q99",) * 7 + ("binary",)
    assert spec.action[6] == "action[6:7]" and spec.state[7] == "observation.state[7:8]"

    index = index_of(
        LeRobotSource.read(sets.write_libero(tmp_path / "libero_goal")), tmp_path / "i"
    )
    spec, reader = index.spec, FrameReader(index)
    assert (spec.name, spec.action_modes) == ("libero_lara", ("min_max",) * 6 + ("none",))
    assert spec.state_modes == ("none",) * 8
    assert spec.roles == {"primary": "image", "wrist": "wrist_image"}
    for episode, step, (at, camera) in itertools.product(
        range(3), (0, 5, -1), enumerate(("image", "wrist_image"))
    ):
        step %= LENGTHS[episode]
        frame = int(index.episodes[episode]["first_frame"]) + step
        assert number_of(reader.image(camera, frame)) == sets.number(episode, step, at)


def test_tasks_that_the_release_leaves_out_are_counted(tmp_path: Path) -> None:
    assert len(LAYOUTS["bridge_lara"].without_tasks) == 21
    tasks = sets.with_left_out((0, 11, 3, 4))
    root = sets.write_bridge(tmp_path / "bridge_orig_lerobot", tasks=tasks)
    for episode in (1, 3):  # left out, so not even looked at
        (root / f"videos/chunk-000/{sets.BRIDGE[0]}/episode_{episode:06d}.mp4").write_bytes(b"-")
    index = index_of(LeRobotSource.read(root, "all"), tmp_path / "i")
    assert index.episodes["record"].tolist() == [0, 2]
    assert index.header.counts["empty_episodes"] == 0
    assert index.header.counts["left_out_episodes"] == 2
    assert index.episodes["number"].tolist() == [0, 2]
    assert index.header.counts["dropped_steps"] == LENGTHS[1] + LENGTHS[3]
    # Steps of annotations are those of the episode's own number, whatever was left out before it.
    assert index.annotation(LENGTHS[0]) == Annotation(subtask="subtask 2.0", motion="motion 2.0")


@pytest.mark.parametrize(
    ("folder", "tasks"),
    [
        ("my_bridge", sets.with_left_out((0, 11, 3, 4))),  # the same numbers by chance
        ("bridge_orig_lerobot", dict(zip((0, 11, 3, 4), TASKS, strict=True))),
    ],
)
def test_tasks_of_other_data_sets_are_kept(
    tmp_path: Path, folder: str, tasks: dict[int, str]
) -> None:
    """Numbers of tasks mean something in the release's own set only."""
    root = sets.write_bridge(tmp_path / folder, tasks=tasks)
    index = index_of(LeRobotSource.read(root, "all"), tmp_path / "i")
    assert index.spec.name == "bridge_lara"
    assert index.header.counts["left_out_episodes"] == 0
    assert index.episodes["record"].tolist() == [0, 1, 2, 3]


def test_left_out_episodes_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = sets.with_left_out((0, 11, 3, 4))
    root = sets.write_bridge(tmp_path / "bridge_orig_lerobot", tasks=tasks)
    assert cli.main([str(root), "--split", "train", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["left_out_episodes"] == 1
    assert "; 1 episodes that its definition leaves out" in err


def test_order_of_modality_entries(tmp_path: Path) -> None:
    """Columns are taken by name: here the gripper comes first."""
    modality = json.loads(json.dumps(sets.BRIDGE_MODALITY))
    for at, name in enumerate(("gripper", *sets.POSE)):
        modality["action"][name] = {"start": at, "end": at + 1, "original_key": "action"}
    root = sets.write_set(tmp_path / "bridge", modality=modality)
    index = index_of(LeRobotSource.read(root), tmp_path / "i")
    expected = np.concatenate([np.roll(sets.actions(e), -1, axis=1) for e in range(3)])
    np.testing.assert_array_equal(index.actions, expected)


def test_splits(bridge: Path, tmp_path: Path) -> None:
    index = index_of(LeRobotSource.read(bridge, "valid"), tmp_path / "i")
    assert index.episodes["record"].tolist() == [3]
    np.testing.assert_array_equal(index.actions, sets.actions(3))
    frame = FrameReader(index).image("image_0", LENGTHS[3] - 1)
    assert number_of(frame) == sets.number(3, LENGTHS[3] - 1, 0)
    with pytest.raises(ValueError, match="no split 'test'; it has: train, valid, train_valid, all"):
        LeRobotSource.read(bridge, "test")


def test_a_source_pickles_and_its_shards_cover_the_files(bridge: Path) -> None:
    source = pickle.loads(pickle.dumps(LeRobotSource.read(bridge)))
    assert sum(shard.episodes for shard in source.shards) == 3
    named = {file for shard in source.shards for file in shard.files}
    others = ("meta/", "annotations/")
    meta = {n for n, file in enumerate(source.files) if file.path.startswith(others)}
    assert len(meta) >= 6 and named | meta == set(range(len(source.files)))
    for file in source.files:
        assert file.size == (bridge / file.path).stat().st_size
    last = len(source.files) - 1
    before = source.checksum(last)
    path = bridge / source.files[last].path
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert source.checksum(last) != before
    finally:
        path.write_bytes(data)


def test_data_sets_of_other_file_systems(bridge: Path, bridge_index: Index, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in bridge.rglob("*"):
        if path.is_file() and "annotations" not in path.parts:
            memory.pipe(
                f"/bucket/{bridge.parent.name}/bridge/{path.relative_to(bridge)}", path.read_bytes()
            )
    url = f"memory://bucket/{bridge.parent.name}/bridge"
    assert is_lerobot(url) and not is_lerobot("memory://bucket/none")
    index = index_of(LeRobotSource.read(url), tmp_path / "i")
    np.testing.assert_array_equal(index.actions, bridge_index.actions)
    for name in ("pts", "keyframe_pts"):  # the files' numbers differ by those of annotations
        frames, expected = (i.frames["image_0"][name] for i in (index, bridge_index))
        np.testing.assert_array_equal(frames, expected)
    assert number_of(FrameReader(index).image("image_0", 20)) == 20


def test_a_plain_data_set_needs_a_definition(tmp_path: Path) -> None:
    root = sets.write_set(tmp_path / "my-arm", robot="my arm")
    draft = (
        r"\[datasets.my_arm\] with control_hz = 5, cameras = \{ image_0 = .*action \(7 wide dx dy\)"
    )
    with pytest.raises(ValueError, match=rf"its columns mean is not known.*--definitions.*{draft}"):
        LeRobotSource.read(root)
    text = """
        [datasets.my_arm]
        control_hz = 5
        cameras = { image_0 = "observation.images.image_0" }
        roles = { primary = "image_0" }
        action = ["action[0:6]", "action[6:7] | invert"]
        state = ["observation.state[0:3]"]
        state_encoding = "POS_EULER"
        state_modes = ["q99", "q99", "q99"]
        rows = ["drop_first"]
    """
    (tmp_path / "mine.toml").write_text(text)
    datasets, _ = load_definitions(tmp_path / "mine.toml")
    index = index_of(LeRobotSource.read(root, definitions=datasets), tmp_path / "i")
    np.testing.assert_array_equal(index.actions[:13, 6], 1 - sets.actions(0)[1:, 6])
    np.testing.assert_array_equal(index.states[:13], sets.states(0)[1:, :3])
    assert index.rows["frame"][:3].tolist() == [1, 2, 3] and index.instruction(0) == TASKS[0]

    slow = {"my_arm": replace(datasets["my_arm"], control_hz=10.0)}
    with pytest.raises(ValueError, match=r"5 steps a second; .*'my_arm' says control_hz = 10, exp"):
        LeRobotSource.read(root, definitions=slow)
    other = {"my_arm": replace(datasets["my_arm"], cameras={"image_0": "observation.images.top"})}
    with pytest.raises(ValueError, match=r"no camera observation.images.top; it has: .*image_0"):
        LeRobotSource.read(root, definitions=other)


def test_a_layout_is_not_guessed_from_columns_alone(tmp_path: Path) -> None:
    root = sets.write_libero(tmp_path / "austin_buds")
    with pytest.raises(ValueError, match=r"looks like libero_lara: .* name contain 'libero'"):
        LeRobotSource.read(root)
    assert LeRobotSource.read(root, name="libero_franka").spec.name == "libero_lara"
    with pytest.raises(ValueError, match=r"is no bridge_lara: that has the cameras .*image_0"):
        LeRobotSource.read(root, name="bridge_lara")
    with pytest.raises(
        ValueError, match=r"no definition or LeRobot layout 'mine'; known: bridge_l"
    ):
        LeRobotSource.read(root, name="mine")


def test_success_of_an_episode(tmp_path: Path) -> None:
    root = sets.write_bridge(tmp_path / "bridge")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    sets.write_json(root / "meta/info.json", info)
    for episode, length in enumerate(LENGTHS):
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        last = np.arange(length) == (length - 1 if episode != 1 else -1)
        pq.write_table(pq.read_table(path).append_column("next.success", pa.array(last)), path)
    spec = replace(LAYOUTS["bridge_lara"].spec, success="next.success")
    source = LeRobotSource.read(root, definitions={"b": replace(spec, name="bridge")})
    assert index_of(source, tmp_path / "i").episodes["success"].tolist() == [1, 0, 1]


# What is wrong with a data set, what is done to it, and what the error says.
Break = Callable[[Path], None]
DATA = "data/chunk-000/episode_000001.parquet"
VIDEO = f"videos/chunk-000/{sets.BRIDGE[0]}/episode_000001.mp4"


def edit(file: str, change: Callable[[dict], dict]) -> Break:
    """Changes a JSON file, or the columns of a parquet file."""

    def apply(root: Path) -> None:
        path = root / file
        if path.suffix == ".json":
            sets.write_json(path, change(json.loads(path.read_text())))
        else:
            pq.write_table(pa.table(change(pq.read_table(path).to_pydict())), path)

    return apply


def remove(file: str) -> Break:
    return lambda root: (root / file).unlink()


def write(file: str, data: bytes) -> Break:
    return lambda root: (root / file).write_bytes(data) and None


def append(file: str, line: str) -> Break:
    return lambda root: (root / file).write_text((root / file).read_text() + line) and None


def short_video(root: Path) -> None:
    write_video(root / VIDEO, range(LENGTHS[1] - 1), fps=sets.FPS)


def video_at_another_rate(root: Path) -> None:
    write_video(root / VIDEO, range(40), fps=4)


def without_shape(info: dict) -> dict:
    del info["features"]["action"]["shape"]
    return info


def images_in_parquet(info: dict) -> dict:
    info["features"][sets.BRIDGE[0]]["dtype"] = "image"
    return info


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (remove("meta/info.json"), FileNotFoundError, r"no LeRobot data set.*meta/info.json"),
        (write("meta/info.json", b"{"), ValueError, r"info.json is no JSON"),
        (
            edit("meta/info.json", lambda info: info | {"codebase_version": "v1.6"}),
            ValueError,
            r"info.json: codebase_version is 'v1.6'; allowed: v2.0, v2.1, v3.0",
        ),
        (
            edit("meta/info.json", lambda info: {k: v for k, v in info.items() if k != "fps"}),
            ValueError,
            r"info.json: 'fps' should be steps a second, above 0; got None",
        ),
        (edit("meta/info.json", lambda info: []), ValueError, r"info.json should be .*object; got"),
        (
            edit("meta/info.json", lambda info: info | {"features": [1]}),
            ValueError,
            r"info.json: 'features' should be a JSON object; got \[1\]",
        ),
        (
            edit("meta/info.json", lambda info: info | {"video_path": None}),
            ValueError,
            r"info.json: 'video_path' should be a pattern of file names; got None",
        ),
        (
            edit(
                "meta/info.json", lambda info: {k: v for k, v in info.items() if k != "video_path"}
            ),
            ValueError,
            r"info.json: 'video_path' should be a pattern of file names; got None",
        ),
        (
            edit("meta/info.json", without_shape),
            ValueError,
            r"info.json: feature 'action': 'shape' should be a list of sizes; got None",
        ),
        (
            edit("meta/modality.json", lambda m: {"state": 3}),
            ValueError,
            r"modality.json: 'state' should be a JSON object; got 3",
        ),
        (
            edit("meta/modality.json", lambda m: m | {"video": {"image_0": 3}}),
            ValueError,
            r"modality.json: video.image_0 should be a JSON object; got 3",
        ),
        (write("meta/tasks.jsonl", b"3"), ValueError, r"tasks.jsonl, line 1, should be a JSON obj"),
        (write("meta/tasks.jsonl", b"null"), ValueError, r"tasks.jsonl, line 1, should be a JSON"),
        (
            edit("meta/info.json", lambda info: info | {"total_episodes": 5}),
            ValueError,
            r"counts 5 episodes; the list of episodes has 4, 4 different",
        ),
        (
            append("meta/episodes.jsonl", '{"episode_index": 3, "tasks": [""], "length": 11}\n'),
            ValueError,
            r"counts 4 episodes; the list of episodes has 5, 4 different",
        ),
        (
            edit("meta/info.json", lambda info: info | {"splits": {"train": "some"}}),
            ValueError,
            r"split 'train' is 'some'; allowed: first:end",
        ),
        (
            edit("meta/info.json", lambda info: info | {"splits": {"train": "7:9"}}),
            ValueError,
            r"split 'train' has no episode",
        ),
        (edit("meta/info.json", images_in_parquet), ValueError, r"stored as images.*convert"),
        (
            edit("meta/info.json", lambda info: info | {"fps": 10}),
            ValueError,
            r"episode_000000.parquet, episode 0, row 1: timestamp 0.2.* at 10 steps.*0.1",
        ),
        (remove("meta/tasks.jsonl"), FileNotFoundError, r"has no file meta/tasks.jsonl"),
        (append("meta/tasks.jsonl", "{}\n"), ValueError, r"line 5, has no field task_index, task"),
        (append("meta/episodes.jsonl", "[\n"), ValueError, r"episodes.jsonl, line 5, is no JSON"),
        (
            edit("meta/modality.json", lambda m: m | {"action": {"x": {"start": 0}}}),
            ValueError,
            r"modality.json: action.x: 'end' should be a number; got None",
        ),
        (remove(DATA), FileNotFoundError, r"lacks 1 of .* files: data/chunk-000/episode_000001"),
        (write(DATA, b"no parquet"), ValueError, r"episode_000001.parquet is no readable parquet"),
        (
            edit(DATA, lambda rows: {k: v for k, v in rows.items() if k != "action"}),
            ValueError,
            r"episode_000001.parquet has no column action; it has: observation.state",
        ),
        (
            edit(DATA, lambda rows: {k: v[:-1] for k, v in rows.items()}),
            ValueError,
            r"has 8 rows of episode 1; the list of episodes says 9",
        ),
        (
            edit(DATA, lambda rows: {k: v[::-1] for k, v in rows.items()}),
            ValueError,
            r"episode 1, row 0: timestamp 1.6",
        ),
        (
            edit(DATA, lambda rows: rows | {"task_index": [77] * 9}),
            ValueError,
            r"episode 1: no text of task 77; there are 4 tasks",
        ),
        (
            edit(DATA, lambda rows: rows | {"action": [[0.0] * 6] * 9}),
            ValueError,
            r"column 'action' has 54 numbers in 9 rows; its shape in info.json is \(7,\)",
        ),
        (
            edit(DATA, lambda rows: rows | {"action": [*rows["action"][:-1], None]}),
            ValueError,
            r"column 'action' has 1 empty rows",
        ),
        (
            edit(DATA, lambda rows: rows | {"action": [[float("nan")] * 7] * 9}),
            ValueError,
            r"feature 'action' is not finite at step 0",
        ),
        (remove(VIDEO), FileNotFoundError, r"lacks 1 of .* files: videos/.*episode_000001.mp4"),
        (write(VIDEO, b"no video"), ValueError, r"episode_000001.mp4 is no readable video"),
        (short_video, ValueError, r"000001.mp4 has 8 frames; episode 1 has 9 rows in data/"),
        (
            video_at_another_rate,
            ValueError,
            r"episode 1, 5 steps a second: .*000001.mp4: no frame at 0.2.*nearest .* 0.25",
        ),
        (
            append(
                "annotations/episode_dense_captions_full_final.jsonl",
                '{"episode_index": 1, "steps": {"9": {"subtask": "a", "reasoning": ""}}}\n',
            ),
            ValueError,
            r"episode 1: an annotation of step 9; the episode has steps 0..8",
        ),
        (
            write("annotations/other_captions.jsonl", b""),
            ValueError,
            r"one \*captions\*.jsonl and at most one .*; it has .*other_captions.jsonl",
        ),
    ],
)
def test_bad_input(
    tmp_path: Path, good_bridge: Path, damage: Break, kind: type[Exception], message: str
) -> None:
    root = shutil.copytree(good_bridge, tmp_path / "bridge")
    damage(root)
    with pytest.raises(kind, match=message):
        index_of(LeRobotSource.read(root), tmp_path / "i")


@pytest.fixture(scope="module")
def good_bridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.write_bridge(tmp_path_factory.mktemp("good") / "bridge")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "tasks",
            lambda t: t.rename_columns(["task_index", "words"]),
            "task_index and task; it has",
        ),
        ("episodes/chunk-000/file-000", lambda t: t.drop_columns(["length"]), "no column length"),
    ],
)
def test_bad_metadata_in_parquet(
    tmp_path: Path, file: str, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    root = sets.write_set(tmp_path / "set", version="v3.0", cameras=())
    path = root / f"meta/{file}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(ValueError, match=message):
        Metadata.read(str(root))
    path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=r"no file meta/|counts 4 episodes"):
        Metadata.read(str(root))


def test_damaged_frames_are_refused_or_flagged(tmp_path: Path, good_bridge: Path) -> None:
    root = shutil.copytree(good_bridge, tmp_path / "bridge")
    damage_packet(root / f"videos/chunk-000/{sets.BRIDGE[0]}/episode_000002.mp4", 6)
    whole = index_of(LeRobotSource.read(root), tmp_path / "unseen")
    assert whole.header.counts["flag:bad_frame"] == 0
    with pytest.raises(ValueError, match=r"episode_000002.mp4"):
        index_of(LeRobotSource.read(root, decode_frames=True), tmp_path / "refused")
    flagging = LeRobotSource.read(root, decode_frames=True, flag_bad_frames=True)
    index = index_source(flagging, tmp_path / "flagged", workers=1, max_bad_fraction=0.9)
    assert 0 < index.header.counts["flag:bad_frame"] < LENGTHS[2]


def test_shards_hold_whole_files_and_are_not_too_many(
    tmp_path: Path, good_bridge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "EPISODES_PER_SHARD", 1)
    v2, v3 = good_bridge, sets.write_bridge(tmp_path / "bridge", version="v3.0")

    def numbers(root: Path) -> list[list[int]]:
        groups = LeRobotSource.read(root, "all").shard_episodes
        return [[episode.number for episode in group] for group in groups]

    assert numbers(v2) == [[0], [1], [2], [3]]
    assert numbers(v3) == [[0, 1, 2], [3]]
    indexes = [
        index_of(LeRobotSource.read(root, "all"), tmp_path / root.parent.name) for root in (v2, v3)
    ]
    np.testing.assert_array_equal(indexes[0].actions, indexes[1].actions)
    monkeypatch.setattr(source_module, "SHARDS", 2)
    assert numbers(v2) == [[0, 1], [2, 3]]
