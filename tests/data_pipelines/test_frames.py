"""Frames by kind of place, their sizes, and damage that is named."""

import dataclasses
import io
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.frames import FrameReader, decode_image, encoded_size, resize
from data_pipelines.index.format import (
    RECORD,
    VIDEO,
    Camera,
    EpisodeEntry,
    Index,
)
from data_pipelines.index.writer import write_index
from tests.data_pipelines.small_index import decoded, jpeg, make_index


def png(*seed: int, size: tuple[int, int] = (16, 24)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(decoded(jpeg(*seed, size=size))).save(file, "png")
    return file.getvalue()


def test_jpeg_and_png_decode_to_the_pixels_that_were_stored() -> None:
    assert encoded_size(jpeg(1), "here") == encoded_size(png(1), "here") == (16, 24)
    pixels = decode_image(jpeg(1), "here")
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, decode_image(png(1), "here"))


@pytest.mark.parametrize("data", [b"", b"no picture", jpeg(1)[:-200], png(1)[:-200]])
def test_what_is_no_picture_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^here: the frame cannot be decoded"):
        decode_image(data, "here")
    if len(data) < 20:
        with pytest.raises(ValueError, match=r"^here: not an encoded image"):
            encoded_size(data, "here")


def test_every_frame_by_its_running_number(tmp_path: Path) -> None:
    sizes = {"image": (16, 24), "wrist": (8, 8)}
    reader = FrameReader(make_index(tmp_path, episodes=(2, 3), sizes=sizes, dropped=1))
    reader = pickle.loads(pickle.dumps(reader))
    frame = 0
    for episode, stored in enumerate((3, 4)):
        for step in range(stored):
            for c, (camera, size) in enumerate(sizes.items()):
                expected = decoded(jpeg(c, episode, step, size=size))
                np.testing.assert_array_equal(reader.image(camera, frame), expected, strict=True)
            frame += 1


def pairs(
    reader: FrameReader, frames: list[int], later: list[int]
) -> tuple[list[np.ndarray], list[np.ndarray], list[bool]]:
    outs, later_outs = ([np.full((16, 24, 3), 7, np.uint8) for _ in frames] for _ in range(2))
    differs = reader.read_pairs("image", np.array(frames), np.array(later), outs, later_outs)
    return outs, later_outs, differs.tolist()


def test_a_pair_differs_if_its_bytes_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps 0 and 1 show the same.
    index = make_index(tmp_path, picture=lambda c, e, t, size: jpeg(e, max(t, 1), size=size))
    reader = FrameReader(index)
    reads: list[list[int]] = []
    read = FrameReader.read
    monkeypatch.setattr(
        FrameReader, "read", lambda self, c, f, outs: reads.append(f) or read(self, c, f, outs)
    )
    frames, later = [1, 0, 3, 5], [2, 1, 3, 6]
    outs, later_outs, differs = pairs(reader, frames, later)
    assert differs == [True, False, False, True]
    assert reads == [frames, [2, 6]]
    for found, expected in ((outs, frames), (later_outs, later)):
        for pixels, frame in zip(found, expected, strict=True):
            np.testing.assert_array_equal(pixels, reader.image("image", frame))


def test_frames_are_read_to_where_they_are_wanted(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    batch = np.full((3, 2, 16, 24, 3), 7, np.uint8)
    FrameReader(index).read("image", [4, 0], [batch[2, 1], batch[0, 0]])
    np.testing.assert_array_equal(batch[2, 1], FrameReader(index).image("image", 4))
    np.testing.assert_array_equal(batch[0, 0], FrameReader(index).image("image", 0))
    for place in ((0, 1), (1, 0), (1, 1), (2, 0)):
        assert (batch[place] == 7).all()


@pytest.mark.parametrize("size", [(16, 24), (12, 12), (40, 40), (128, 256), (100, 300)])
def test_frames_are_brought_to_a_size(tmp_path: Path, size: tuple[int, int]) -> None:
    smooth = resize(decoded(jpeg(1, size=(4, 4))), (256, 320))
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "jpeg", quality=95)
    index = make_index(
        tmp_path, sizes={"image": (256, 320)}, picture=lambda *_, size: file.getvalue()
    )
    image = FrameReader(index, size).image("image", 0)
    assert image.shape == (*size, 3)
    np.testing.assert_array_equal(image, resize(decoded(file.getvalue()), size))


@pytest.mark.parametrize("size", [(16, 32), (32, 48), (8, 12), (24, 16)])
def test_a_frame_of_another_size_is_named(tmp_path: Path, size: tuple[int, int]) -> None:
    index = make_index(
        tmp_path, picture=lambda c, e, t, size, other=size: jpeg(e, t, size=other if e else size)
    )
    found = f"{size[0]}x{size[1]} px"
    match = rf"frames\.bin, record 1, step 0, camera 'image': .*{found}.*16x24 px.*image_size"
    with pytest.raises(ValueError, match=match):
        FrameReader(index).image("image", 4)
    assert FrameReader(index, (16, 24)).image("image", 4).shape == (16, 24, 3)


def test_damage_is_named(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    reader, file = FrameReader(index), tmp_path / "frames.bin"
    data = bytearray(file.read_bytes())
    data[int(index.frames["image"][5]["offset"]) + 300] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"record 1, step 1, camera 'image': .*bytes .* damaged"):
        reader.image("image", 5)
    reader.image("image", 6)
    with pytest.raises(ValueError, match=r"record 1, step 1, camera 'image': .*bytes .* damaged"):
        reader.read("image", [4, 5, 6], [np.empty((16, 24, 3), np.uint8)] * 3)
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"record 2, step 4, camera 'image': .*frames\.bin"):
        reader.image("image", 11)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"record 0, step 0, camera 'image'"):
        reader.image("image", 0)


def other_kind(tmp_path: Path, kind: str, frames: np.ndarray) -> Index:
    """An index whose frames lie elsewhere."""
    index = make_index(tmp_path / "encoded", episodes=(len(frames),))
    entry = EpisodeEntry(
        key="",
        file=0,
        record=0,
        success=None,
        actions=index.actions,
        states=index.states,
        frame=index.rows["frame"],
        next_frame=index.rows["next_frame"],
        instructions=[""] * len(frames),
        annotations=(),
        flags=index.rows["flags"],
        frames={"image": frames},
        stored_steps=len(frames),
    )
    cameras = {"image": Camera(kind=kind, height=16, width=24)}
    header = dataclasses.replace(index.header, cameras=cameras, counts={}, arrays={})
    return write_index(tmp_path / kind, header, [entry])


def test_videos_and_step_records_are_read_by_their_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(module: str, function: Any) -> None:
        package, name = module.rsplit(".", 1)
        fake = types.SimpleNamespace(read_frame=function)
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(f"{package}.{name}", fake, raising=False)

    def video(path: str, pts: int, keyframe_pts: int) -> np.ndarray:
        assert path.endswith("frames.bin") and keyframe_pts == 100
        return decoded(jpeg(pts // 512))

    def record(path: str, record: int, camera: str) -> bytes:
        assert path.endswith("frames.bin") and camera == "image"
        if record == 2:
            raise ValueError("no such record")
        return jpeg(record)

    stand_in("data_pipelines.lerobot.video", video)
    stand_in("data_pipelines.convert.step_records", record)
    reader = FrameReader(
        other_kind(tmp_path, "video", np.array([(0, 512, 100), (0, 1024, 100)], VIDEO))
    )
    np.testing.assert_array_equal(reader.image("image", 1), decoded(jpeg(2)))
    assert pairs(reader, [0], [1])[2] == [True]
    reader = FrameReader(other_kind(tmp_path, "record", np.array([(0, 7), (0, 7), (0, 2)], RECORD)))
    np.testing.assert_array_equal(reader.image("image", 0), decoded(jpeg(7)))
    assert pairs(reader, [0], [1])[2] == [False]  # in two places, but the same picture
    with pytest.raises(ValueError, match="step 2, camera 'image': no such record"):
        reader.image("image", 2)
    assert FrameReader(reader.index, (8, 8)).image("image", 0).shape == (8, 8, 3)
