"""LeRobot to RLDS and back through our own reader: the same numbers, words and annotations."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines.annotate.readers import EpisodeName
from data_pipelines.frames import FrameReader
from data_pipelines.index.build import index_source
from data_pipelines.index.format import Index
from data_pipelines.lerobot.rlds import converted_spec, rlds_episodes, rlds_features
from data_pipelines.lerobot.source import LeRobotSource
from data_pipelines.rlds.source import RldsSource
from data_pipelines.rlds.writer import write_dataset
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.lerobot import sets
from tests.data_pipelines.lerobot.sets import LENGTHS
from tests.data_pipelines.lerobot.videos import HEIGHT, WIDTH, barcode, number_of


def converted(source: LeRobotSource, folder: Path) -> Index:
    """The index of the source's conversion."""
    shards = range(len(source.shard_episodes))
    directory = write_dataset(
        folder / "rlds",
        name="converted",
        version="1.0.0",
        description="",
        features=rlds_features(source),
        splits={"train": chain.from_iterable(rlds_episodes(source, shard) for shard in shards)},
    )
    spec = replace(converted_spec(source), name="converted")
    rlds = RldsSource.read(directory, "train", definitions={"converted": spec})
    return index_source(rlds, folder / "rlds_index", workers=1)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("write", [sets.write_bridge, sets.write_libero])
def test_round_trip(tmp_path: Path, version: str, write: Callable[..., Path]) -> None:
    source = LeRobotSource.read(write(tmp_path / write.__name__, version=version))
    ours, theirs = index_source(source, tmp_path / "index", workers=1), converted(source, tmp_path)
    assert theirs.spec.control_hz == sets.FPS
    for name in ("actions", "states"):
        np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name))
    rows = range(len(ours))
    assert [theirs.instruction(r) for r in rows] == [ours.instruction(r) for r in rows]
    assert [theirs.annotation(r) for r in rows] == [ours.annotation(r) for r in rows]
    assert theirs.annotation(1) is not None and theirs.annotation(LENGTHS[0]) is None
    assert theirs.header.counts == ours.header.counts
    assert [theirs.key(e) for e in range(3)] == [ours.key(e) for e in range(3)]
    np.testing.assert_array_equal(theirs.rows["next_frame"], ours.rows["next_frame"])
    for camera in ours.header.cameras:
        for frame in range(sum(LENGTHS[:3])):
            image = FrameReader(theirs).image(camera, frame)
            video = FrameReader(ours).image(camera, frame)
            assert number_of(image) == number_of(video)
            assert np.abs(image.astype(int) - video).mean() < 2


def test_left_out_tasks_stay_out_and_success_stays(tmp_path: Path) -> None:
    tasks = sets.with_left_out((0, 11, 3, 4))
    root = sets.write_set(
        tmp_path / "bridge_orig_lerobot", tasks=tasks, modality=sets.BRIDGE_MODALITY
    )
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["next.success"] = {"dtype": "bool", "shape": [1], "names": None}
    sets.write_json(root / "meta/info.json", info)
    for episode, length in enumerate(LENGTHS):
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        success = pa.array(np.arange(length) == (length - 1 if episode == 2 else -1))
        pq.write_table(pq.read_table(path).append_column("next.success", success), path)
    source = LeRobotSource.read(root)
    source = replace(source, spec=replace(source.spec, success="next.success"))
    index = converted(source, tmp_path)
    assert [index.key(e) for e in range(len(index.episodes))] == [
        "episode_000000",
        "episode_000002",
    ]
    assert index.episodes["success"].tolist() == [0, 1]
    assert index.header.annotations == {}


def test_images_in_parquet_files_are_converted(tmp_path: Path) -> None:
    """Which cannot be indexed where they are."""
    root = sets.write_set(tmp_path / "bridge", modality=sets.BRIDGE_MODALITY, cameras=())
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][sets.BRIDGE[0]] = {"dtype": "image", "shape": [3, HEIGHT, WIDTH]}
    sets.write_json(root / "meta/info.json", info)
    for episode, length in enumerate(LENGTHS):
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        images = []
        for step in range(length):
            buffer = io.BytesIO()
            Image.fromarray(barcode(sets.number(episode, step, 0))).save(buffer, "png")
            images.append({"bytes": buffer.getvalue(), "path": f"{step}.png"})
        pq.write_table(pq.read_table(path).append_column(sets.BRIDGE[0], pa.array(images)), path)
    source = LeRobotSource.read(root)
    with pytest.raises(ValueError, match=r"'image_0' .* stored as images .*lerobot_to_rlds"):
        index_source(source, tmp_path / "index", workers=1)
    index = converted(source, tmp_path)
    frames = range(sum(LENGTHS[:3]))
    assert [number_of(FrameReader(index).image("image_0", frame)) for frame in frames] == list(
        frames
    )


class ThreeBoxes:
    """Annotations that RLDS has no room for."""

    fingerprint = "three"

    description = "three"

    def episode(self, name: EpisodeName) -> dict[int, Annotation]:
        return {2: Annotation(boxes=((0.0, 0.0, 1.0, 1.0),) * 3)}


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    root = sets.write_set(tmp_path / "bridge", modality=sets.BRIDGE_MODALITY)
    source = LeRobotSource.read(root, provider=ThreeBoxes())
    with pytest.raises(ValueError, match=r"episode 0, step 2: 3 boxes; at most 2"):
        list(rlds_episodes(source, 0))

    def with_feature(key: str, **feature: object) -> LeRobotSource:
        info = json.loads((root / "meta/info.json").read_text())
        info["features"][key] = {"dtype": "float32", "shape": [1], "names": None} | feature
        other = tmp_path / key.replace("/", "_") / "bridge"
        sets.write_set(other, modality=sets.BRIDGE_MODALITY, info={"features": info["features"]})
        return LeRobotSource.read(other)

    with pytest.raises(ValueError, match="several columns would become steps/observation/state"):
        rlds_features(with_feature("observation/state"))
    with pytest.raises(
        ValueError, match=r"observation.depth' has the shape \(48, 64, 1\); allowed"
    ):
        rlds_features(with_feature("observation.depth", dtype="image", shape=[48, 64, 1]))
