"""TFDS directories: equal to what tensorflow_datasets reads, and every bad input is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_pipelines.rlds.directory import Directory
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    frame,
    tabletop_record,
    tensor,
    write_directory,
    write_tabletop,
)
from tests.data_pipelines.protobuf_reader import Example, read_split


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tabletop(tmp_path)


def first(path: Path) -> Example:
    return read_split(Directory.read(path), "train")[0]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_handmade_directory_is_what_tfds_writes(path: Path) -> None:
    builder = tfds.builder_from_directory(str(path))
    directory = Directory.read(path)
    split, same = builder.info.splits["train"], directory.split("train")
    assert split.shard_lengths == list(same.shard_lengths) == [2, 1]
    assert [Path(file) for file in split.filepaths] == list(same.files)
    examples = read_split(directory, "train")
    episode = builder.info.features.deserialize_example_np(examples[1].payload)
    np.testing.assert_array_equal(
        [step["action"] for step in episode["steps"]], tabletop_record(1, 3)["steps/action"]
    )


def test_reads_step_and_episode_features(path: Path) -> None:
    record, example = tabletop_record(0, 4), first(path)
    for key in ("steps/action", "steps/observation/state", "steps/reasoning/boxes"):
        np.testing.assert_array_equal(example.array(key), record[key], strict=True)
    np.testing.assert_array_equal(
        example.array("steps/is_last"), [False, False, False, True], strict=True
    )
    assert example.array("episode_metadata/success").shape == ()
    assert example.text("episode_metadata/file_path") == ["episode_0"]
    assert example.text("steps/language_instruction") == ["task 0"] * 4
    assert example.encoded("steps/observation/image") == record["steps/observation/image"]


def test_equals_tfds_on_real_data(shared_dir: Path) -> None:
    directory = Directory.read(shared_dir / "data/bridge_dataset/1.0.0")
    assert (directory.name, directory.version) == ("bridge_dataset", "1.0.0")
    features = tfds.builder_from_directory(str(directory.path)).info.features
    for example in read_split(directory, "val"):
        steps = list(features.deserialize_example_np(example.payload)["steps"])
        for key in ("action", "observation/state", "is_last", "reward"):
            names = key.split("/")
            expected = [step[names[0]][names[1]] if names[1:] else step[key] for step in steps]
            np.testing.assert_array_equal(
                example.array(f"steps/{key}"), np.stack(expected), strict=True
            )
        words = [step["language_instruction"].decode() for step in steps]
        assert example.text("steps/language_instruction") == words


def test_no_version_directory(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dataset_info.json; did you mean .*1\.0\.0\?"):
        Directory.read(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        Directory.read(tmp_path / "absent")
    (path / "features.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"features\.json is missing"):
        Directory.read(path)


def test_malformed_metadata(path: Path) -> None:
    edit_json(path / "dataset_info.json", fileFormat="array_record")
    with pytest.raises(ValueError, match="'array_record'; only 'tfrecord'"):
        Directory.read(path)
    (path / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_info\.json is not JSON"):
        Directory.read(path)


def test_a_wrong_split_lists_the_splits(shared_dir: Path) -> None:
    directory = Directory.read(shared_dir / "data/bridge_dataset/1.0.0")
    with pytest.raises(ValueError, match=r"no split 'test'; it has: train, val"):
        read_split(directory, "test")


def test_a_missing_shard(path: Path) -> None:
    (path / "lara_tabletop-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of-00002 is missing.*2 file\(s\).*'train'"):
        read_split(Directory.read(path), "train")


def test_a_shard_with_another_number_of_records(path: Path) -> None:
    info = json.loads((path / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["2", "7"]
    edit_json(path / "dataset_info.json", splits=info["splits"])
    with pytest.raises(
        ValueError, match=r"00001-of-00002 has 1 records; dataset_info\.json says 7"
    ):
        read_split(Directory.read(path), "train")


def test_other_file_templates(path: Path) -> None:
    info = json.loads((path / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = "{SPLIT}-{SHARD_INDEX}-{NUM_SHARDS}.{FILEFORMAT}"
    edit_json(path / "dataset_info.json", splits=info["splits"])
    for number in range(2):
        old = path / f"lara_tabletop-train.tfrecord-0000{number}-of-00002"
        old.rename(path / f"train-0000{number}-00002.tfrecord")
    assert len(read_split(Directory.read(path), "train")) == 3
    info["splits"][0]["filepathTemplate"] = "{SPLITT}"
    edit_json(path / "dataset_info.json", splits=info["splits"])
    with pytest.raises(ValueError, match="unknown field 'SPLITT'"):
        Directory.read(path)


def test_a_feature_missing_from_the_schema_lists_all(path: Path) -> None:
    with pytest.raises(ValueError, match=r"no feature 'steps/torque'; it has: .*steps/action, "):
        first(path).array("steps/torque")


def test_a_feature_missing_from_a_record_names_the_record(tmp_path: Path) -> None:
    record = tabletop_record(1, 3)
    del record["steps/action"]
    path = write_tabletop(tmp_path, [tabletop_record(0, 4), record])
    directory = Directory.read(path)
    example = read_split(directory, "train")[1]
    with pytest.raises(
        ValueError, match=r"00000-of-00001, record 1: feature 'steps/action' is missing.*steps/is_"
    ):
        example.array("steps/action")


@pytest.mark.parametrize(
    ("key", "value", "reader", "message"),
    [
        ("steps/action", np.zeros(29, np.float32), "array", r"29 values; its shape is \(7,\)"),
        ("steps/action", np.zeros(28, np.int64), "array", "int64_list; .* means float_list"),
        ("steps/reasoning/motion", [b"\xff"] * 4, "text", "not UTF-8"),
        ("episode_metadata/success", np.array([1, 0]), "array", "2 values, not 1"),
        ("steps/action", np.zeros(28, np.float32), "text", "neither image nor text"),
        ("steps/reasoning/motion", [b"left"] * 4, "array", "text of string, not a number"),
    ],
)
def test_an_ill_shaped_feature_is_named(
    tmp_path: Path, key: str, value: Any, reader: str, message: str
) -> None:
    path = write_tabletop(tmp_path, [tabletop_record(0, 4) | {key: value}])
    with pytest.raises(ValueError, match=rf"record 0: feature '{key}' .*{message}"):
        getattr(first(path), reader)(key)


def test_a_record_that_is_no_example_is_named(path: Path) -> None:
    shard = path / "lara_tabletop-train.tfrecord-00001-of-00002"
    shard.write_bytes(frame(b"not a protocol buffer"))
    directory = Directory.read(path)
    with pytest.raises(ValueError, match=r"00001-of-00002, record 0: not a tf\.train\.Example"):
        read_split(directory, "train")


def test_a_compressed_tensor_is_refused(tmp_path: Path) -> None:
    zipped = tensor(7)
    zipped["tensor"]["encoding"] = "zlib"
    features = TABLETOP_FEATURES | {"steps/action": zipped}
    shards = [[tabletop_record(0, 4)]]
    path = write_directory(tmp_path / "1.0.0", "lara_tabletop", features, {"train": shards})
    with pytest.raises(ValueError, match="'steps/action' is tensor encoded by zlib"):
        first(path).array("steps/action")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("dataset_info.json", "[]", r"dataset_info\.json is \[\], not a JSON object"),
        ("dataset_info.json", '{"name": "x"}', r"dataset_info\.json has no field 'splits'"),
        ("dataset_info.json", '{"name": 3, "splits": []}', r"'name' is 3, not a str"),
        ("dataset_info.json", '{"name": "x", "splits": 3}', r"'splits' is 3, not a list"),
        ("dataset_info.json", '{"name": "x", "splits": [3]}', r"'splits', entry 0 is 3, not a J"),
        (
            "dataset_info.json",
            '{"name": "x", "splits": [{"shardLengths": ["1"]}]}',
            r"dataset_info\.json, 'splits', entry 0 has no field 'name'",
        ),
        (
            "dataset_info.json",
            '{"name": "x", "splits": [{"name": "train", "shardLengths": ["x"]}]}',
            r"dataset_info\.json, .*'shardLengths' is \[\"x\"\], not a list of whole numbers",
        ),
        ("features.json", "3", r"features\.json is 3, not a JSON object"),
        (
            "features.json",
            '{"featuresDict": 3}',
            r"features\.json: 'featuresDict' is 3, not a dict",
        ),
        (
            "features.json",
            '{"featuresDict": {"features": {"a": {"tensor": {"shape": {"dimensions": [null]}}}}}}',
            r"'shape': 'dimensions' is \[null\], not a list of whole numbers",
        ),
    ],
)
def test_a_description_of_another_shape_is_named(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    path = write_tabletop(tmp_path)
    (path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        Directory.read(path)
