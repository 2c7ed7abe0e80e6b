"""From where a frame lies to its pixels.

An index says of each stored frame where it lies; there are three kinds of places::

    encoded   bytes [offset, offset + length) of a file     a JPEG or PNG inside a TFRecord
    video     a time stamp in a video file                  decoded from the key frame before it
    record    a record of an ArrayRecord file               one step, all cameras encoded

`FrameReader` reads and decodes any of them. It holds no file, no cache and no state, so that it may
be used by many threads and sent to other processes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import google_crc32c
import numpy as np
import simplejpeg
from PIL import Image

from data_pipelines import storage
from data_pipelines.index.format import Index

# What a broken file raises in simplejpeg (ValueError) and in Pillow.
_BROKEN = (ValueError, OSError, SyntaxError)


@dataclass(frozen=True)
class FrameReader:
    """Reads frames of an index.

    Attributes:
      index: says where the frames lie.
      size: (height, width) in px to bring every frame to; None for frames as they are stored, which
        must then have the size that the index gives for their camera.
    """

    index: Index
    size: tuple[int, int] | None = None

    def image(self, camera: str, frame: int) -> np.ndarray:
        """A frame's pixels, uint8[H, W, 3], RGB: `read`, into a new array."""
        out = np.empty((*(self.size or self._stored_size(camera)), 3), np.uint8)
        self.read(camera, [frame], [out])
        return out

    def read(self, camera: str, frames: Sequence[int], outs: Sequence[np.ndarray]) -> None:
        """Reads frames of a camera.

        Args:
          camera: a camera of the index.
          frames: running numbers of N stored frames, over all episodes.
          outs: N times uint8[H, W, 3], get the pixels, RGB. JPEGs of that size are decoded in
            place.

        Raises:
          FileNotFoundError: a file is not there.
          ValueError: the bytes are not those that were indexed, do not decode, or have another
            size. The message names file, record, step and camera.
        """
        places = self.index.frames[camera][frames].tolist()
        number = 0  # which one it is about, for errors
        try:
            if self.index.header.cameras[camera].kind == "video":
                for number, place in enumerate(places):
                    self._put(camera, self._video_frame(place), outs[number])
                return
            # All the bytes first: a decoder that is kept busy is a tenth faster than one that the
            # interpreter, between two frames, pushes out of the processor's cache.
            encoded = [b""] * len(places)
            for number, place in enumerate(places):
                encoded[number] = self._encoded(camera, place)
            for number, data in enumerate(encoded):
                self._put(camera, _decode(data, outs[number]), outs[number])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.where(camera, frames[number])}: {error}") from error
        except _BROKEN as error:
            raise ValueError(f"{self.where(camera, frames[number])}: {error}") from error

    def read_pairs(
        self,
        camera: str,
        frames: np.ndarray,
        later: np.ndarray,
        outs: Sequence[np.ndarray],
        later_outs: Sequence[np.ndarray],
    ) -> np.ndarray:
        """Reads N frames of a camera, each with a later one, as `read` does.

        Encoded frames differ if their bytes do, which the index knows: equal ones are read once.
        Other frames are compared pixel by pixel.

        Returns:
          bool[N], True where the two differ.
        """
        self.read(camera, frames.tolist(), outs)
        differs = frames != later
        encoded = self.index.header.cameras[camera].kind == "encoded"
        if encoded:
            one, other = self.index.frames[camera][frames], self.index.frames[camera][later]
            differs &= (one["length"] != other["length"]) | (one["crc"] != other["crc"])
        others = np.flatnonzero(differs).tolist()
        self.read(camera, later[others].tolist(), [later_outs[i] for i in others])
        for i in np.flatnonzero(~differs).tolist():
            later_outs[i][:] = outs[i]
        if not encoded:
            differs[others] = [not np.array_equal(outs[i], later_outs[i]) for i in others]
        return differs

    def where(self, camera: str, frame: int) -> str:
        """Names a frame: "/data/x.tfrecord-00000-of-00001, record 3, step 7, camera 'image_0'"."""
        episodes = self.index.episodes
        episode = episodes[int(np.searchsorted(episodes["first_frame"], frame, side="right")) - 1]
        step = frame - int(episode["first_frame"])
        return (
            f"{self._paths[episode['file']]}, record {episode['record']}, step {step}, "
            f"camera {camera!r}"
        )

    @cached_property
    def _paths(self) -> tuple[str, ...]:
        """Of the index's files."""
        index = self.index
        return tuple(storage.join(index.source, file.path) for file in index.header.files)

    def _stored_size(self, camera: str) -> tuple[int, int]:
        """(height, width) of the camera's first frame, px."""
        found = self.index.header.cameras[camera]
        return found.height, found.width

    def _encoded(self, camera: str, place: tuple[int, ...]) -> bytes:
        """The encoded frame that lies at a place, RECORD or ENCODED."""
        path = self._paths[place[0]]
        if self.index.header.cameras[camera].kind == "record":
            from data_pipelines.convert import step_records

            _, record = place
            return step_records.read_frame(path, record, camera)
        _, offset, length, crc = place
        data = storage.read_range(path, offset, length)
        if google_crc32c.value(data) != crc:
            raise ValueError(
                f"the frame's bytes ({length} at {offset}) are not those that were indexed: the "
                f"file is damaged or another one"
            )
        return data

    def _video_frame(self, place: tuple[int, ...]) -> np.ndarray:
        """The frame that lies at a place, VIDEO."""
        # PyAV is an extra.
        from data_pipelines.lerobot import video

        file, pts, keyframe_pts = place
        return video.read_frame(self._paths[file], pts, keyframe_pts)

    def _put(self, camera: str, image: np.ndarray, out: np.ndarray) -> None:
        """Writes a frame where it is wanted, in the size that is wanted, unless it is there."""
        if image is out:
            return
        if self.size is not None:
            image = resize(image, self.size)
        elif image.shape[:2] != self._stored_size(camera):
            raise ValueError(
                f"the frame is {_px(image.shape[:2])}, the camera's first one "
                f"{_px(self._stored_size(camera))}; with an image size given (image_size), all "
                f"frames are brought to it"
            )
        out[:] = image


def decode_image(data: bytes, where: str) -> np.ndarray:
    """An encoded frame as uint8[H, W, 3], RGB.

    JPEGs are decoded with the fast integer DCT: to the bit what TensorFlow's decoder gives, and so
    what policies trained through tf.data have seen. Other formats go through Pillow.

    Args:
      data: a JPEG, PNG or whatever else Pillow reads.
      where: names the frame in messages.
    """
    try:
        return _decode(data)
    except _BROKEN as error:
        raise ValueError(f"{where}: {error}") from error


def encoded_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) in px of an encoded frame, from its header alone."""
    try:
        if _is_jpeg(data):
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return height, width
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except _BROKEN as error:
        raise ValueError(f"{where}: not an encoded image ({error})") from error


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Brings a frame to a size, bicubic and antialiased; as it is where it has that size.

    Args:
      image: uint8[H, W, 3].
      size: (height, width), px.
    """
    if image.shape[:2] == size:
        return image
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _decode(data: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """An encoded frame's pixels.

    Args:
      data: as of `decode_image`.
      out: uint8[H, W, 3], memory to use; a JPEG of that size is decoded in place.

    Returns:
      uint8[H', W', 3]: `out` itself if it is of that size.
    """
    try:
        if not _is_jpeg(data):
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
        try:
            pixels = _decode_jpeg(data, out)
        except ValueError:
            # `out` is too small; or the data is broken, which shows again.
            pixels = _decode_jpeg(data, None)
        return out if out is not None and pixels.shape == out.shape else pixels
    except _BROKEN as error:
        raise ValueError(f"the frame cannot be decoded ({error})") from error


def _decode_jpeg(data: bytes, out: np.ndarray | None) -> np.ndarray:
    """uint8[H', W', 3], in the memory of `out` if it is given."""
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=False, buffer=out)


def _is_jpeg(data: bytes) -> bool:
    """True if the data starts as a JPEG does, a truncated one too: decoding it then says so."""
    return data[:2] == b"\xff\xd8"


def _px(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} px (height x width)"
