"""Frames of a video, exactly: not the nearest key frame, not the nearest time, the frame asked for.

Most frames of a video are stored as changes to others, so a decoder can start at key frames only::

    decode order        I0  P3  B1  B2 | I4  P7  B5  B6        "|" starts a group of pictures
    presentation order  I0  B1  B2  P3   I4  B5  B6  P7

    frame 6: seek to I4, decode forward, give out 4, 5, 6 in order of presentation; keep the last.

A frame is named by its presentation timestamp (pts), an integer in the stream's time base. `scan`
lists them all, with the key frame to start from, without decoding anything; `read_frame` seeks and
then compares timestamps as integers: it returns the frame with that very pts or fails.

Each thread keeps a few files open where it left them, so that the frames t and t + 1 cost one seek,
and reading in order costs none. A frame at random costs half a group of pictures to decode: sets
with long groups are better converted to RLDS before training (`data_pipelines.lerobot.rlds`).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from data_pipelines import storage
from data_pipelines.lerobot import MissingExtra

try:
    import av
except ImportError as error:
    raise MissingExtra(
        "videos need PyAV: install the extra `lerobot` (lara-jax[lerobot])"
    ) from error

# A decoder holds up to 16 frames to refer to, so this bounds the memory of a thread: at 256 px
# about 8 MB.
OPEN_FILES_PER_THREAD = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoTable:
    """The frames of a video in order of presentation.

    Attributes:
      path: of the file.
      pts: int64[F], increasing, in units of `time_base`.
      keyframe_pts: int64[F], where to start decoding for each frame.
      time_base: seconds per unit.
      height, width: px.
    """

    path: str
    pts: np.ndarray
    keyframe_pts: np.ndarray
    time_base: Fraction
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def seconds(self) -> np.ndarray:
        """float64[F], when each frame is shown."""
        return self.pts * float(self.time_base)

    def frames_at(self, seconds: np.ndarray, *, tolerance_seconds: float) -> np.ndarray:
        """The frames shown at given times.

        Args:
          seconds: float64[T].
          tolerance_seconds: how far a frame may be from its time.

        Returns:
          int64[T], positions in this table.

        Raises:
          ValueError: a time has no frame within the tolerance.
        """
        shown = self.seconds
        after = np.searchsorted(shown, seconds).clip(0, len(shown) - 1)
        before = (after - 1).clip(0)
        nearest = np.where(seconds - shown[before] < shown[after] - seconds, before, after)
        off = np.abs(shown[nearest] - seconds)
        if (off > tolerance_seconds).any():
            worst = int(np.argmax(off > tolerance_seconds))
            raise ValueError(
                f"{self.path}: no frame at {seconds[worst]:.6f} s (step {worst} of the episode); "
                f"the nearest of {len(self)} is at {shown[nearest[worst]]:.6f} s, "
                f"allowed are {tolerance_seconds:g} s"
            )
        return nearest


def scan(path: str) -> VideoTable:
    """Lists the frames of a video; decodes none.

    Args:
      path: a local file or a URL.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no video, is cut short, or its frames carry no timestamps.
    """
    pts: list[int] = []
    keys: list[bool] = []
    with _open(path) as container:
        stream = _video_stream(container, path)
        codec = stream.codec_context
        height, width, time_base = codec.height, codec.width, stream.time_base
        try:
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:  # the end; frames that an edit list hides
                    continue
                if packet.is_corrupt or packet.pts is None:
                    what = "is cut short" if packet.is_corrupt else "has no timestamp"
                    raise ValueError(f"{path}: packet {len(pts)} {what}")
                pts.append(packet.pts)
                keys.append(packet.is_keyframe)
        except av.FFmpegError as error:
            raise ValueError(
                f"{path}: damaged after {len(pts)} frames: {error.strerror}"
            ) from error
    if not pts:
        raise ValueError(f"{path}: a video without frames")
    order = np.argsort(pts, kind="stable")
    shown, is_key = np.array(pts, np.int64)[order], np.array(keys)[order]
    if not is_key[0] or (np.diff(shown) <= 0).any():
        raise ValueError(
            f"{path}: must begin with a key frame and show each frame at a time of its own"
        )
    latest_key = np.maximum.accumulate(np.where(is_key, np.arange(len(shown)), 0))
    return VideoTable(
        path=path,
        pts=shown,
        keyframe_pts=shown[latest_key],
        time_base=time_base,
        height=height,
        width=width,
    )


def read_frame(path: str, pts: int, keyframe_pts: int) -> np.ndarray:
    """One frame; safe to call from many threads.

    Args:
      path: a local file or a URL.
      pts, keyframe_pts: of the frame, from `scan`.

    Returns:
      uint8[H, W, 3], RGB.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the video has no frame of this pts, or it is damaged.
    """
    decoders: OrderedDict[str, _Decoder] = _THREAD.__dict__.setdefault("decoders", OrderedDict())
    decoder = decoders.pop(path, None) or _Decoder(path)
    # Kept only if it works: a decoder that failed stands at an unknown place.
    with ExitStack() as on_failure:
        on_failure.callback(decoder.close)
        image = decoder.read(pts, keyframe_pts)
        on_failure.pop_all()
    decoders[path] = decoder
    if len(decoders) > OPEN_FILES_PER_THREAD:
        decoders.popitem(last=False)[1].close()
    return image


_THREAD = threading.local()


class _Decoder:
    """An open video and the frame that it gave last."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.container = _open(path)
        self.stream = _video_stream(self.container, path)
        # The callers are many threads already; more of them here would only add latency.
        self.stream.codec_context.thread_count = 1
        self.to_rgb = av.video.reformatter.VideoReformatter()
        self.frames: Iterator[Any] = iter(())
        self.last: Any = None

    def read(self, pts: int, keyframe_pts: int) -> np.ndarray:
        """See `read_frame`."""
        try:
            frame = self._decode(pts, keyframe_pts)
        except av.FFmpegError as error:
            raise ValueError(f"{self.path}: frame at pts {pts}: {error.strerror}") from error
        rgb = self.to_rgb.reformat(frame, format="rgb24", threads=1)
        return np.asarray(rgb.to_ndarray())

    def close(self) -> None:
        """Closes the file."""
        self.last = None
        self.container.close()

    def _decode(self, pts: int, keyframe_pts: int) -> Any:
        last = self.last
        if last is not None and last.pts == pts:
            return last
        # Forward is at least as cheap as a seek unless there is a key frame in between; one that
        # follows at once is the next frame anyhow.
        nearby = last is not None and last.pts < pts and keyframe_pts <= last.pts + last.duration
        if not nearby:
            self.container.seek(keyframe_pts, stream=self.stream)
            self.frames = self.container.decode(self.stream)
        seen = None
        for frame in self.frames:
            seen = frame.pts
            if frame.is_corrupt:
                raise ValueError(f"{self.path}: the frame at pts {seen} is damaged")
            if seen is not None and seen >= pts:
                break
        if seen != pts:
            raise ValueError(
                f"{self.path}: no frame at pts {pts} after the key frame at {keyframe_pts}; "
                f"the decoder came to {seen}"
            )
        self.last = frame
        return frame


def _open(path: str) -> Any:
    """A container, of a local file or of a URL."""
    try:
        return av.open(path if storage.is_local(path) else storage.open_read(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no video {path}") from error
    except av.FFmpegError as error:
        raise ValueError(f"{path} is no readable video: {error.strerror}") from error


def _video_stream(container: Any, path: str) -> Any:
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} holds no video stream")
    return container.streams.video[0]
