"""Episodes and samples: right values from real and hand-made data, and bad input named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from data_pipelines.episodes import StepSource, action_chunk, load_episodes
from data_pipelines.rlds.tfrecord import TFRecordFile
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    encode,
    tabletop_record,
    write_directory,
    write_tabletop,
)

IMAGE = "steps/observation/image"


def test_real_samples(shared_dir: Path) -> None:
    path = shared_dir / "data/bridge_dataset/1.0.0"
    views = ("image_0", "image_2")
    source = StepSource(load_episodes(path, "train", views=views), action_horizon=3)
    assert source.table.image_size == (64, 64)
    assert (len(source), source.table.dropped_steps) == (25 * 8, 25 * 2)
    assert "steps=200" in repr(source)
    features = tfds.builder_from_directory(str(path)).info.features
    features = tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(_without_decoding(features["steps"].feature))}
    )
    shard = TFRecordFile(next(path.glob("*-train.tfrecord-*")))
    for number in (0, 13, 24):
        steps = list(features.deserialize_example_np(shard.read(number))["steps"])
        state = np.stack([step["observation"]["state"] for step in steps])
        for row in (0, 6, 7):
            sample = source[8 * number + row]
            for v, view in enumerate(views):
                now, then = (_decode(steps[row + t]["observation"][view]) for t in (1, 2))
                np.testing.assert_array_equal(sample["images"][v], now, strict=True)
                np.testing.assert_array_equal(sample["next_images"][v], then, strict=True)
                assert sample["next_mask"][v] == np.any(now != then)
            np.testing.assert_array_equal(sample["state"], np.insert(state[row + 1], 6, 0))
            np.testing.assert_array_equal(
                sample["actions"][0, :6], state[row + 2, :6] - state[row + 1, :6]
            )
            assert set(sample["actions"][:, 6]) <= {0.0, 1.0}
            np.testing.assert_array_equal(sample["action_mask"], np.arange(row, row + 3) < 8)
            assert sample["instruction"] == steps[0]["language_instruction"].decode()
            assert sample["annotation"] is None
            assert sample["sample_id"] == 8 * number + row


def _without_decoding(steps: Any) -> dict[str, Any]:
    """The step features with images as plain byte strings."""
    raw = tfds.features.Text()
    observation = {
        key: raw if key.startswith("image") else feature
        for key, feature in steps["observation"].items()
    }
    return dict(steps.items()) | {"observation": observation}


def _decode(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, fastdct=True)


def test_handmade_samples(tmp_path: Path) -> None:
    records = [tabletop_record(0, 4), tabletop_record(1, 3), tabletop_record(2, 5)]
    source = StepSource(load_episodes(write_tabletop(tmp_path), "train"), action_horizon=2)
    assert (len(source), source.table.dropped_steps) == (12, 0)
    index = 0
    for number, record in enumerate(records):
        frames = [_decode(data) for data in record[IMAGE]]
        last = len(frames) - 1
        for t in range(len(frames)):
            sample = source[index]
            assert sample["sample_id"] == index
            assert sample["instruction"] == f"task {number}"
            np.testing.assert_array_equal(sample["images"], [frames[t]])
            np.testing.assert_array_equal(sample["next_images"], [frames[min(t + 1, last)]])
            np.testing.assert_array_equal(sample["next_mask"], [t < last], strict=True)
            np.testing.assert_array_equal(sample["view_mask"], [True], strict=True)
            np.testing.assert_array_equal(sample["state"], record["steps/observation/state"][t])
            np.testing.assert_array_equal(sample["actions"][0], record["steps/action"][t])
            np.testing.assert_array_equal(sample["action_mask"], [True, t < last], strict=True)
            boxes = tuple(tuple(box) for box in record["steps/reasoning/boxes"][t].tolist())
            assert sample["annotation"] == Annotation(f"subtask {t}", boxes, f"motion {t}")
            index += 1
    with pytest.raises(IndexError, match="step 12 of 12"):
        source[12]
    assert source.table.where(4).endswith("00000-of-00002, record 1, step 0")


def test_a_chunk_holds_still_past_the_end() -> None:
    actions = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    absolute = np.array([False, False, True])
    chunk, mask = action_chunk(actions, 2, 4, absolute)
    np.testing.assert_array_equal(mask, [True, True, False, False], strict=True)
    expected = [[7, 8, 9], [10, 11, 12], [0, 0, 12], [0, 0, 12]]
    np.testing.assert_array_equal(chunk, np.array(expected, np.float32), strict=True)


def test_a_still_scene_has_no_next_frame(tmp_path: Path) -> None:
    record = tabletop_record(0, 4)
    pixels = np.full((16, 24, 3), 99, np.uint8)
    # The same picture in other bytes (frames 0 and 1) and in the same bytes (frames 1 and 2).
    png = encode(pixels, "png")
    record[IMAGE] = [encode(pixels, "jpeg"), png, png, record[IMAGE][3]]
    source = StepSource(
        load_episodes(write_tabletop(tmp_path, [record]), "train"), action_horizon=1
    )
    assert [bool(source[t]["next_mask"][0]) for t in range(4)] == [False, False, True, False]


def test_png_frames(tmp_path: Path) -> None:
    record = tabletop_record(0, 2, encoding="png")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    path = write_tabletop(tmp_path, [record])
    sample = StepSource(load_episodes(path, "train"), action_horizon=1)[0]
    np.testing.assert_array_equal(sample["images"][0], pixels[0], strict=True)
    np.testing.assert_array_equal(sample["next_images"][0], pixels[1], strict=True)


def test_annotations_leave_out_what_is_missing(tmp_path: Path) -> None:
    record = tabletop_record(0, 3)
    box = record["steps/reasoning/boxes"][1, 1]
    record["steps/reasoning/boxes"][:, 0] = np.nan
    record["steps/reasoning/boxes"][2, 1, 3] = np.nan
    record["steps/reasoning/subtask"][2] = b""
    record["steps/reasoning/motion"][1:] = [b"", b""]
    record["steps/language_instruction"] = [b"", "größer".encode(), b""]
    (episode,) = load_episodes(write_tabletop(tmp_path, [record]), "train").episodes
    assert episode.annotations[1] == Annotation("subtask 1", (tuple(box.tolist()),), "")
    assert episode.annotations[2] is None
    assert episode.instructions == ("", "größer", "")


def test_without_annotation_features_there_is_no_annotation(tmp_path: Path) -> None:
    features = {k: v for k, v in TABLETOP_FEATURES.items() if "reasoning" not in k}
    record = {k: v for k, v in tabletop_record(0, 3).items() if "reasoning" not in k}
    path = write_directory(tmp_path / "a", "lara_tabletop", features, {"train": [[record]]})
    (episode,) = load_episodes(path, "train").episodes
    assert episode.annotations == (None, None, None)

    features["steps/reasoning/motion"] = TABLETOP_FEATURES["steps/reasoning/motion"]
    path = write_directory(tmp_path / "b", "lara_tabletop", features, {"train": [[record]]})
    with pytest.raises(ValueError, match="no feature 'steps/reasoning/subtask'"):
        load_episodes(path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps/observation/state": np.zeros((4, 8), np.float32)}, "'.*state' has 4 steps, .* 3"),
        ({"steps/language_instruction": [b"go"]}, "'.*_instruction' has 1 steps, the actions 3"),
        ({IMAGE: tabletop_record(0, 2)[IMAGE]}, "image' has 2 steps, the actions 3"),
        ({"steps/action": np.full((3, 7), np.nan, np.float32)}, "step 0: .*action' is not finite"),
        ({"steps/reasoning/boxes": np.full((3, 2, 4), np.inf, np.float32)}, "boxes' holds an inf"),
        ({IMAGE: [b"no picture"] * 3}, "step 0, view 'image': not an encoded image"),
        ({IMAGE: [b""] * 3}, "step 0, view 'image': not an encoded image"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_tabletop(tmp_path, [tabletop_record(1, 3), tabletop_record(0, 3) | change])
    with pytest.raises(ValueError, match=f"00000-of-00001, record 1.*{message}"):
        load_episodes(path, "train")


def test_frames_of_another_size_name_episode_view_and_sizes(tmp_path: Path) -> None:
    path = write_tabletop(tmp_path, [tabletop_record(0, 3), tabletop_record(1, 3, size=(16, 32))])
    with pytest.raises(ValueError, match=r"record 1, step 0, view 'image': .*16x32 px.*16x24"):
        load_episodes(path, "train")


def test_a_frame_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    record = tabletop_record(0, 3)
    record[IMAGE][2] = record[IMAGE][2][:-200]  # the header is whole, the picture is not
    source = StepSource(
        load_episodes(write_tabletop(tmp_path, [record]), "train"), action_horizon=1
    )
    assert source[0]["next_mask"].all()
    with pytest.raises(ValueError, match=r"record 0, step 2, view 'image': .* cannot be decoded"):
        source[1]


def test_a_feature_of_another_width_is_named(tmp_path: Path) -> None:
    features = TABLETOP_FEATURES | {"steps/action": TABLETOP_FEATURES["steps/observation/state"]}
    record = tabletop_record(0, 3) | {"steps/action": np.zeros((3, 8), np.float32)}
    path = write_directory(tmp_path / "a", "lara_tabletop", features, {"train": [[record]]})
    with pytest.raises(
        ValueError, match=r"'steps/action' has shape \(8,\) a step, expected \(7,\)"
    ):
        load_episodes(path, "train")


def test_unknown_dataset_split_view_and_horizon(tmp_path: Path) -> None:
    records = {"train": [[tabletop_record(0, 3)]]}
    other = write_directory(tmp_path / "other", "kitchen", TABLETOP_FEATURES, records)
    with pytest.raises(ValueError, match="'kitchen'; known: bridge_dataset, lara_tabletop"):
        load_episodes(other, "train")
    path = write_tabletop(tmp_path)
    with pytest.raises(ValueError, match="no split 'val'; it has: train"):
        load_episodes(path, "val")
    with pytest.raises(ValueError, match=r"no view\(s\) \['wrist'\]; it has: image"):
        load_episodes(path, "train", views=("wrist",))
    with pytest.raises(ValueError, match="action_horizon is 0"):
        StepSource(load_episodes(path, "train"), action_horizon=0)


def test_a_view_that_the_directory_lacks(tmp_path: Path) -> None:
    features = {k: v for k, v in TABLETOP_FEATURES.items() if k != IMAGE}
    path = write_directory(
        tmp_path / "a", "lara_tabletop", features, {"train": [[tabletop_record(0, 3)]]}
    )
    with pytest.raises(
        ValueError, match=r"features\.json has no feature 'steps/observation/image'"
    ):
        load_episodes(path, "train")


@pytest.mark.parametrize("shards", [[], [[]]])
def test_an_empty_split_is_an_error(tmp_path: Path, shards: list[Any]) -> None:
    path = write_directory(tmp_path / "a", "lara_tabletop", TABLETOP_FEATURES, {"train": shards})
    with pytest.raises(ValueError, match=r"split 'train': no step to learn from \(0 episodes"):
        load_episodes(path, "train")
