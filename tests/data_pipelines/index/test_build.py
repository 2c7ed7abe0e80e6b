"""Indexes of RLDS data: what they hold, and every bad input is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.frames import FrameReader, decode_image
from data_pipelines.index.build import build_index, index_folder, index_source, open_source
from data_pipelines.index.format import Index
from data_pipelines.oxe.standardize import required_keys, standardize
from data_pipelines.rlds.directory import Directory
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    frame,
    tabletop_record,
    write_directory,
    write_tabletop,
)
from tests.data_pipelines.protobuf_reader import read_split

SHARD = "lara_tabletop-train.tfrecord-00000-of-00002"
MINE = """
[datasets.two_cameras]
control_hz = 5.0
cameras = { front = "observation/image", wrist = "observation/wrist" }
roles = { primary = "front", wrist = "wrist" }
action = ["action"]
state = ["observation/state"]
episode_key = ["episode_metadata/file_path"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tabletop(tmp_path)


def build(path: Path, **options: Any) -> Index:
    return build_index(path, "train", workers=1, **options)


def test_an_index_holds_what_the_records_hold(path: Path) -> None:
    index = build(path)
    records = [tabletop_record(0, 4), tabletop_record(1, 3), tabletop_record(2, 5)]
    expected_counts = {"episodes": 3, "rows": 12, "stored_steps": 12, "dropped_steps": 0}
    assert expected_counts.items() <= index.header.counts.items()
    assert index.episodes["file"].tolist() == [0, 0, 1]
    assert index.episodes["record"].tolist() == [0, 1, 0]
    assert index.episodes["success"].tolist() == [1, 1, 1]
    assert [index.key(number) for number in range(3)] == ["episode_0", "episode_1", "episode_2"]
    for name, key in (("actions", "steps/action"), ("states", "steps/observation/state")):
        expected = np.concatenate([record[key] for record in records])
        np.testing.assert_array_equal(getattr(index, name), expected, strict=True)
    words = [text for r in records for text in r["steps/language_instruction"]]
    assert [index.instruction(row).encode() for row in range(12)] == words
    assert index.annotation(5) == Annotation(
        subtask="subtask 1",
        boxes=tuple(map(tuple, records[1]["steps/reasoning/boxes"][1].tolist())),
        motion="motion 1",
    )
    images = [image for record in records for image in record["steps/observation/image"]]
    reader = FrameReader(index)
    for number, image in enumerate(images):
        np.testing.assert_array_equal(reader.image("image", number), decode_image(image, ""))
    assert [file.path for file in index.header.files] == [SHARD, SHARD.replace("0-of", "1-of")]
    camera = index.header.cameras["image"]
    assert (camera.kind, camera.height, camera.width) == ("encoded", 16, 24)


def test_equals_protobuf_and_standardize_on_real_data(shared_dir: Path, tmp_path: Path) -> None:
    directory = Directory.read(shared_dir / "data/bridge_dataset/1.0.0")
    index = build_index(directory.path, "train", tmp_path / "train", workers=1)
    examples, reader = read_split(directory, "train"), FrameReader(index)
    assert index.header.counts["episodes"] == len(examples) == 25
    for number, (example, episode) in enumerate(zip(examples, index.episodes, strict=True)):
        raw: dict[str, Any] = {}
        for key in required_keys(index.spec):
            feature = directory.feature(f"steps/{key}")
            read = example.encoded if feature.kind == "text" else example.array
            raw[key] = read(feature.key)
        expected = standardize(index.spec, raw)
        rows = slice(episode["first_row"], episode["first_row"] + episode["rows"])
        np.testing.assert_array_equal(index.actions[rows], expected.actions)
        np.testing.assert_array_equal(index.states[rows], expected.states)
        np.testing.assert_array_equal(index.rows["frame"][rows], expected.frame)
        np.testing.assert_array_equal(index.rows["next_frame"][rows], expected.next_frame)
        assert index.instruction(rows.start) == expected.instructions[0]
        path = example.text("episode_metadata/file_path")[0]
        assert index.key(number) == f"{path}_{example.array('episode_metadata/episode_id')}"
        for camera in index.header.cameras:
            images = example.encoded(f"steps/observation/{camera}")
            for step in (0, len(images) - 1):
                found = reader.image(camera, int(episode["first_frame"]) + step)
                np.testing.assert_array_equal(found, decode_image(images[step], ""))


def test_the_number_of_workers_changes_nothing(path: Path, tmp_path: Path) -> None:
    source = open_source(path, "train")
    for workers in (1, 2):
        index_source(source, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    with pytest.raises(ValueError, match="workers is 0"):
        build_index(path, "train", tmp_path / "0", workers=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_index_lies_beside_the_data_or_in_the_cache(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LARA_JAX_CACHE", str(tmp_path / "cache"))
    assert index_folder(path, "train") == path / "lara_index" / "train"
    remote = index_folder("gs://bucket/fmb/0.0.1/", "train")
    assert remote.parent.parent == tmp_path / "cache/index"
    assert remote.parent.name.startswith("fmb-0.0.1-")
    assert remote != index_folder("gs://other/fmb/0.0.1", "train")
    assert remote == index_folder("gs://bucket/fmb/0.0.1", "train")
    path.chmod(0o555)
    assert index_folder(path, "train").is_relative_to(tmp_path / "cache")
    path.chmod(0o755)
    build(path)
    path.chmod(0o555)
    assert index_folder(path, "train") == path / "lara_index" / "train"
    path.chmod(0o755)


def test_a_camera_that_the_data_lack_is_absent(tmp_path: Path) -> None:
    definitions = tmp_path / "mine.toml"
    definitions.write_text(MINE)
    shards = [[tabletop_record(0, 4)]]
    path = write_directory(tmp_path / "1.0.0", "two_cameras", TABLETOP_FEATURES, {"train": shards})
    assert tuple(build(path, definitions=definitions).header.cameras) == ("front",)
    definitions.write_text(MINE.replace("observation/image", "observation/front"))
    with pytest.raises(ValueError, match=r"no feature 'steps/observation/front'; it has: .*image"):
        build(path, definitions=definitions)


def test_zero_length_episodes_are_counted(tmp_path: Path) -> None:
    path = write_tabletop(tmp_path, [tabletop_record(0, 4), tabletop_record(1, 0)])
    index = build(path)
    assert (index.header.counts["episodes"], index.header.counts["empty_episodes"]) == (1, 1)
    only = write_tabletop(tmp_path / "only", [tabletop_record(1, 0)])
    with pytest.raises(ValueError, match=r"no step to learn from \(1 empty episodes"):
        build(only)


def test_a_schema_without_language_is_refused(tmp_path: Path) -> None:
    features = dict(TABLETOP_FEATURES)
    del features["steps/language_instruction"]
    shards = [[tabletop_record(0, 4)]]
    path = write_directory(tmp_path / "1.0.0", "lara_tabletop", features, {"train": shards})
    with pytest.raises(
        ValueError, match=r"no feature 'steps/language_instruction'; it has: .*steps/action"
    ):
        build(path)


def test_an_unknown_dataset_or_split_is_refused(tmp_path: Path, path: Path) -> None:
    shards = [[tabletop_record(0, 4)]]
    other = write_directory(tmp_path / "o/1.0.0", "mystery", TABLETOP_FEATURES, {"train": shards})
    with pytest.raises(ValueError, match="unknown dataset 'mystery'"):
        build(other)
    with pytest.raises(ValueError, match="no split 'test'; it has: train"):
        build_index(path, "test")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        build(tmp_path / "nothing")


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.__delitem__(key)


def put(key: str, place: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record[key].__setitem__(place, value)


def cut(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.__setitem__(key, record[key][:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("steps/action"), r"feature 'steps/action' is missing; the record has: .*steps/is"),
        (without("steps/language_instruction"), r"'steps/language_instruction' is missing"),
        (without("steps/observation/image"), r"'steps/observation/image' is missing"),
        (without("episode_metadata/success"), r"'episode_metadata/success' is missing"),
        (put("steps/action", (2, 3), np.nan), r"'action' is not finite at step 2"),
        (put("steps/observation/state", (1, 0), np.inf), r"'observation/state' .*finite.*step 1"),
        (cut("steps/observation/image"), r"different lengths: .*'image': 2"),
        (cut("steps/language_instruction"), r"different lengths: "),
        (cut("steps/reasoning/subtask"), r"3 steps, its reasoning .*subtask': 2"),
        (put("steps/reasoning/boxes", (1, 1, 2), 1.5), r"step 1, box 1: .*outside the image"),
        (put("steps/reasoning/boxes", (0, 0, 0), np.inf), r"step 0, box 0: a box is 4 numbers"),
        (
            lambda record: record.__setitem__("steps/action", np.zeros(20, np.float32)),
            r"'steps/action' of shape \(7,\): cannot reshape",
        ),
    ],
)
def test_a_bad_record_is_named(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    record = tabletop_record(1, 3)
    damage(record)
    path = write_tabletop(tmp_path, [tabletop_record(0, 4), record])
    with pytest.raises(ValueError, match=rf"tfrecord-00000-of-00001, record 1.*{message}"):
        build(path)
    assert not (path / "lara_index" / "train").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-50], r"record 1: truncated"),
        (lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], r"record 1: bad CRC of"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], r"record 0: bad CRC of the length"),
        (lambda data: frame(b"junk") + data, r"record 0: not a tf\.train\.Example"),
        (lambda data: data + data, r"has 4 records; dataset_info\.json says 2"),
        (lambda data: b"", r"has 0 records; dataset_info\.json says 2"),
    ],
)
def test_a_bad_file_is_named(path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file = path / SHARD
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{SHARD}.*{message}"):
        build(path)


def test_a_missing_file_is_named(path: Path) -> None:
    (path / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{SHARD} is missing; .* lists 2 file"):
        build(path)


def test_the_header_is_readable_json(path: Path) -> None:
    header = json.loads((build(path).folder / "index.json").read_text())
    assert header["dataset"] == "lara_tabletop" and header["annotations"]["fingerprint"]
