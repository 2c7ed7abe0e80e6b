"""The TFDS writer: TFDS itself and our reader read back what it writes, and it is careful."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from data_pipelines.rlds import writer
from data_pipelines.rlds.directory import Directory, Feature
from data_pipelines.rlds.writer import encode_episode, write_dataset
from tests.data_pipelines.protobuf_reader import read_split

FEATURES = (
    Feature(
        key="steps/observation/image", kind="image", shape=(16, 24, 3), dtype="uint8", per_step=True
    ),
    Feature(key="steps/action", kind="tensor", shape=(7,), dtype="float32", per_step=True),
    Feature(key="steps/boxes", kind="tensor", shape=(2, 4), dtype="float32", per_step=True),
    Feature(key="steps/is_last", kind="tensor", dtype="bool", per_step=True),
    Feature(key="steps/count", kind="tensor", dtype="int32", per_step=True),
    Feature(key="steps/language_instruction", kind="text", per_step=True),
    Feature(key="episode_metadata/file_path", kind="text"),
    Feature(key="episode_metadata/success", kind="tensor", dtype="bool"),
)


def episode(number: int, steps: int = 3) -> dict[str, Any]:
    random = np.random.default_rng(number)
    boxes = random.random((steps, 2, 4)).astype(np.float32)
    boxes[:, 1] = np.nan
    gradient = np.linspace(0, 255, 24).astype(np.uint8)
    image = np.broadcast_to(gradient[None, :, None], (16, 24, 3))
    return {
        "steps/observation/image": [image] * steps,
        "steps/action": random.random((steps, 7)).astype(np.float32),
        "steps/boxes": boxes,
        "steps/is_last": np.arange(steps) == steps - 1,
        "steps/count": np.arange(steps) - 1,
        "steps/language_instruction": [f"größe {number}"] * steps,
        "episode_metadata/file_path": f"made/{number}",
        "episode_metadata/success": number % 2 == 0,
    }


def write(root: Path, *, train: int = 5, overwrite: bool = False) -> Path:
    return write_dataset(
        root,
        name="tiny_set",
        version="1.2.0",
        description="Made up.",
        features=FEATURES,
        splits={
            "train": (encode_episode(FEATURES, episode(number)) for number in range(train)),
            "val": [encode_episode(FEATURES, episode(9, steps=1))],
        },
        overwrite=overwrite,
    )


def test_tfds_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "EPISODES_PER_SHARD", 2)
    path = write(tmp_path)
    assert path == tmp_path / "tiny_set" / "1.2.0"
    builder = tfds.builder_from_directory(path)
    assert builder.info.full_name == "tiny_set/1.2.0"
    assert builder.info.splits["train"].shard_lengths == [2, 2, 1]
    assert builder.info.splits["val"].num_examples == 1
    assert builder.info.features["steps"]["boxes"].shape == (2, 4)
    assert builder.info.features["steps"]["observation"]["image"].shape == (16, 24, 3)

    directory = Directory.read(path)
    records = [example.payload for example in read_split(directory, "train")]
    assert builder.info.splits["train"].num_bytes == sum(map(len, records))
    for number, record in enumerate(records):
        values, read = episode(number), builder.info.features.deserialize_example_np(record)
        assert read["episode_metadata"]["file_path"] == f"made/{number}".encode()
        assert bool(read["episode_metadata"]["success"]) == (number % 2 == 0)
        steps = list(read["steps"])
        assert len(steps) == 3
        for index, step in enumerate(steps):
            for key in ("action", "boxes", "is_last", "count"):
                np.testing.assert_array_equal(step[key], values[f"steps/{key}"][index])
            assert step["language_instruction"].decode() == f"größe {number}"
            image = step["observation"]["image"].astype(int)
            assert np.abs(image - values["steps/observation/image"][index]).max() <= 6


def test_our_reader_reads_it(tmp_path: Path) -> None:
    directory = Directory.read(write(tmp_path))
    assert directory.features == {feature.key: feature for feature in FEATURES}
    (example,) = read_split(directory, "val")
    values = episode(9, steps=1)
    np.testing.assert_array_equal(example.array("steps/boxes"), values["steps/boxes"])
    assert example.text("steps/language_instruction") == ["größe 9"]
    assert example.array("episode_metadata/success") == np.False_


def test_colours_survive() -> None:
    """Single coloured pixels are not blurred into their neighbours (no chroma subsampling)."""
    feature = Feature(
        key="steps/image", kind="image", shape=(16, 16, 3), dtype="uint8", per_step=True
    )
    image = np.full((1, 16, 16, 3), 128, np.uint8)
    image[0, 8, 8] = (217, 30, 25)
    from tensorflow_datasets.proto import tf_example_pb2

    data = encode_episode([feature], {"steps/image": image})
    stored = tf_example_pb2.Example.FromString(data).features.feature["steps/image"]
    decoded = simplejpeg.decode_jpeg(stored.bytes_list.value[0]).astype(int)
    assert np.abs(decoded - image[0]).max() < 25


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_existing_dataset_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ValueError, match="exists"):
        write(tmp_path, train=1)
    assert len(read_split(Directory.read(path), "train")) == 5
    assert write(tmp_path, train=1, overwrite=True) == path
    assert len(read_split(Directory.read(path), "train")) == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["1.2.0"]


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def breaks() -> Iterator[bytes]:
        yield encode_episode(FEATURES, episode(0))
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        write_dataset(
            tmp_path,
            name="tiny_set",
            version="1.2.0",
            description="",
            features=FEATURES,
            splits={"train": breaks()},
        )
    assert list((tmp_path / "tiny_set").iterdir()) == []


def test_empty_split_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'train' of tiny_set has no episode"):
        write(tmp_path, train=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps/extra": [1, 2, 3]}, "unknown .*steps/extra"),
        ({"steps/action": np.zeros((3, 6), np.float32)}, r"shape \(7,\), got \(6,\)"),
        ({"steps/count": [1, 2]}, "same number of steps"),
    ],
)
def test_wrong_episodes_raise(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_episode(FEATURES, episode(0) | change)


def test_missing_values_and_empty_episodes_raise() -> None:
    values = episode(0)
    del values["steps/action"]
    with pytest.raises(ValueError, match=r"lacks .*steps/action"):
        encode_episode(FEATURES, values)
    with pytest.raises(ValueError, match="at least 1"):
        encode_episode(FEATURES, episode(0, steps=0))


@pytest.mark.parametrize(("kind", "dtype"), [("video", "uint8"), ("image", "uint16")])
def test_unknown_features_raise(tmp_path: Path, kind: str, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"cannot write {kind} of {dtype}"):
        writer.features_tree([Feature(key="steps/x", kind=kind, dtype=dtype, per_step=True)])


def test_metadata_is_plain_json(tmp_path: Path) -> None:
    path = write(tmp_path)
    info = json.loads((path / "dataset_info.json").read_text())
    assert (info["name"], info["version"], info["fileFormat"]) == ("tiny_set", "1.2.0", "tfrecord")
    assert [split["name"] for split in info["splits"]] == ["train", "val"]
    assert math.isclose(
        int(info["splits"][1]["numBytes"]), len(encode_episode(FEATURES, episode(9, steps=1)))
    )
