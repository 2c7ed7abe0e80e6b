"""Frames of videos, exactly: every frame carries its number, so that a wrong one shows."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest

from data_pipelines.lerobot import video
from data_pipelines.lerobot.video import VideoTable, read_frame, scan
from tests.data_pipelines.lerobot.videos import HEIGHT, WIDTH, damage_packet, number_of, write_video

FRAMES = 30
# The container's own way to open a group of pictures: B-frames before the key frame that they use.
OPEN_GOP = {"x264-params": "open-gop=1"}


def read(table: VideoTable, frame: int) -> np.ndarray:
    return read_frame(table.path, int(table.pts[frame]), int(table.keyframe_pts[frame]))


@pytest.fixture(scope="module")
def one_video(tmp_path_factory: pytest.TempPathFactory) -> VideoTable:
    """H.264 with groups of 12 pictures and B-frames."""
    path = tmp_path_factory.mktemp("video") / "episode.mp4"
    return scan(str(write_video(path, range(FRAMES))))


@pytest.mark.parametrize(
    ("codec", "gop", "b_frames", "options"),
    [
        ("libx264", 1, 0, {}),
        ("libx264", 2, 3, {}),
        ("libx264", 12, 2, OPEN_GOP),
        ("libx264", 250, 3, {}),
        ("mpeg4", 7, 2, {}),
        ("libsvtav1", 2, 0, {}),
        ("libsvtav1", 12, 0, {}),
    ],
)
def test_every_frame_in_random_order_is_the_one_asked_for(
    tmp_path: Path, codec: str, gop: int, b_frames: int, options: dict[str, str]
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = write_video(
        tmp_path / "v.mp4", range(FRAMES), codec=codec, gop=gop, b_frames=b_frames, options=options
    )
    table = scan(str(path))
    assert (len(table), table.height, table.width) == (FRAMES, HEIGHT, WIDTH)
    order = list(range(FRAMES)) * 2
    random.Random(gop).shuffle(order)
    assert [number_of(read(table, frame)) for frame in order] == order


def test_seeking_to_the_nearest_key_frame_would_be_wrong(one_video: VideoTable) -> None:
    """The test file has what trips up a reader that takes the first frame after a seek."""
    naive = []
    with av.open(one_video.path) as container:
        for pts in one_video.pts:
            container.seek(int(pts), stream=container.streams.video[0])
            frame = next(container.decode(video=0))
            naive.append(number_of(frame.to_ndarray(format="rgb24")))
        container.seek(0)
        decode_order = [p.pts for p in container.demux(video=0) if p.size]
    assert naive[:14] == [0] * 12 + [12] * 2
    assert decode_order != sorted(decode_order)
    assert [number_of(read(one_video, frame)) for frame in range(FRAMES)] == list(range(FRAMES))


def test_neighbours_and_repeats_cost_no_seek(
    one_video: VideoTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_THREAD", threading.local())  # nothing is open yet
    seeks: list[int] = []

    class Counting:
        """A container that notes where it is asked to seek."""

        def __init__(self, container: av.container.InputContainer) -> None:
            self.container = container

        def seek(self, pts: int, **kwargs: object) -> None:
            seeks.append(pts)
            self.container.seek(pts, **kwargs)

        def __getattr__(self, name: str) -> object:
            return getattr(self.container, name)

    opened = video._open
    monkeypatch.setattr(video, "_open", lambda path: Counting(opened(path)))
    for frame in range(FRAMES):
        assert number_of(read(one_video, frame)) == frame
        assert number_of(read(one_video, frame)) == frame
    assert seeks == [0]
    for frame, seeked in [(3, 1), (4, 0), (11, 0), (25, 1), (24, 1), (24, 0), (25, 0)]:
        seeks.clear()
        assert number_of(read(one_video, frame)) == frame
        assert len(seeks) == seeked, frame


def test_many_threads_read_many_files(tmp_path: Path) -> None:
    files = video.OPEN_FILES_PER_THREAD + 2
    tables = [
        scan(str(write_video(tmp_path / f"{n}.mp4", range(n * 20, n * 20 + 20))))
        for n in range(files)
    ]
    wanted = [(n, frame) for n in range(files) for frame in range(20)]
    random.Random(0).shuffle(wanted)

    def answer(place: tuple[int, int]) -> tuple[int, int]:
        n, frame = place
        number = number_of(read(tables[n], frame))
        assert len(video._THREAD.decoders) <= video.OPEN_FILES_PER_THREAD
        return number // 20, number % 20

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, wanted)) == wanted


def test_a_returned_frame_is_the_callers_own(one_video: VideoTable) -> None:
    read(one_video, 5)[:] = 0
    assert number_of(read(one_video, 5)) == 5


@pytest.mark.parametrize(
    ("matrix", "full_range"), [("ITU601", False), ("ITU709", False), ("ITU709", True)]
)
def test_colours_are_those_that_the_video_was_made_of(
    tmp_path: Path, matrix: str, full_range: bool
) -> None:
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, :32], image[:, 32:64], image[:, 64:] = (250, 30, 20), (20, 230, 40), (30, 40, 240)
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = 32, 96, "yuv420p"
        stream.codec_context.colorspace = {"ITU601": 6, "ITU709": 1}[matrix]
        stream.codec_context.color_range = 2 if full_range else 1
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=matrix,
            dst_color_range="JPEG" if full_range else "MPEG",
        )
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = read(scan(str(path)), 0)
    for column in (16, 48, 80):
        np.testing.assert_allclose(found[16, column], image[16, column].astype(int), atol=5)


def test_frames_at_times(one_video: VideoTable) -> None:
    seconds = np.array([0.0, 0.2, 5.8, 0.4 + 5e-5])
    found = one_video.frames_at(seconds, tolerance_seconds=1e-4)
    np.testing.assert_array_equal(found, [0, 1, 29, 2])
    for late in (6.0, 0.4 + 2e-4, -0.2):
        with pytest.raises(ValueError, match=rf"no frame at {late:.6f} s \(step 1 .*allowed are 0"):
            one_video.frames_at(np.array([0.2, late]), tolerance_seconds=1e-4)


def test_videos_of_other_file_systems(one_video: VideoTable) -> None:
    url = "memory://videos/episode.mp4"
    with fsspec.open(url, "wb") as file:
        file.write(Path(one_video.path).read_bytes())
    table = scan(url)
    np.testing.assert_array_equal(table.pts, one_video.pts)
    assert number_of(read(table, 17)) == 17
    with pytest.raises(FileNotFoundError, match=r"no video memory://videos/none.mp4"):
        scan("memory://videos/none.mp4")


@pytest.mark.parametrize("pts", [1, 10**9, -5])
def test_a_frame_that_is_not_there_is_an_error(one_video: VideoTable, pts: int) -> None:
    with pytest.raises(ValueError, match=rf"episode.mp4: no frame at pts {pts} after the key"):
        read_frame(one_video.path, pts, 0)
    assert number_of(read(one_video, 3)) == 3


def test_damage_is_an_error(tmp_path: Path) -> None:
    options = {"movflags": "faststart"}  # the table of contents stays whole
    path = write_video(tmp_path / "v.mp4", range(FRAMES), container_options=options)
    table, data = scan(str(path)), path.read_bytes()
    damage_packet(path, 12)
    damaged = 0
    for frame in range(FRAMES):
        try:
            assert number_of(read(table, frame)) == frame
        except ValueError as error:
            assert str(path) in str(error)
            damaged += 1
    assert 0 < damaged < FRAMES
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(ValueError, match=r"v.mp4: packet [0-9]+ is cut short"):
        scan(str(path))


@pytest.mark.parametrize(
    ("data", "message"), [(b"", "no readable video"), (b"no video" * 99, "no readable video")]
)
def test_what_is_no_video(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(data)
    for call in (lambda: scan(str(path)), lambda: read_frame(str(path), 0, 0)):
        with pytest.raises(ValueError, match=f"v.mp4.*{message}"):
            call()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no video .*none.mp4"):
        read_frame(str(tmp_path / "none.mp4"), 0, 0)


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"sound.mp4 holds no video stream"):
        scan(str(path))
