"""From where a frame lies to its pixels.

An index says of each stored frame where it lies; there are three kinds of places::

    encoded   bytes [offset, offset + length) of a file     a JPEG or PNG inside a TFRecord
    video     a time stamp in a video file                  decoded from the key frame before it
    record    a record of an ArrayRecord file               one step, all cameras encoded

`FrameReader` reads and decodes any of them. It holds no file, no cache and no state, so that it may
be used by many threads and sent to other processes.
"""

import io
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
        """A frame's pixels.

        Args:
          camera: a camera of the index.
          frame: running number of the stored frame, over all episodes.

        Returns:
          uint8[H, W, 3], RGB.

        Raises:
          FileNotFoundError: the file is not there.
          ValueError: the bytes are not those that were indexed, do not decode, or have another
            size. The message names file, record, step and camera.
        """
        try:
            image = self._read(camera, frame)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.where(camera, frame)}: {error}") from error
        except _BROKEN as error:
            raise ValueError(f"{self.where(camera, frame)}: {error}") from error
        if self.size is not None:
            return resize(image, self.size)
        expected = self.index.header.cameras[camera]
        if image.shape[:2] != (expected.height, expected.width):
            raise ValueError(
                f"{self.where(camera, frame)}: the frame is {_px(image.shape[:2])}, the camera's "
                f"first one {_px((expected.height, expected.width))}; with an image size given "
                f"(image_size), all frames are brought to it"
            )
        return image

    def pair(self, camera: str, frame: int, later: int) -> tuple[np.ndarray, np.ndarray, bool]:
        """Two frames of a camera, and whether they differ.

        Encoded frames differ if their bytes do, which the index knows: equal ones are read once.
        Other frames are compared pixel by pixel.

        Returns:
          uint8[H, W, 3], twice, and True if they differ.
        """
        image = self.image(camera, frame)
        encoded = self.index.header.cameras[camera].kind == "encoded"
        if frame == later or (encoded and self._bytes(camera, frame) == self._bytes(camera, later)):
            return image, image, False
        other = self.image(camera, later)
        return image, other, encoded or not np.array_equal(image, other)

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

    def _bytes(self, camera: str, frame: int) -> tuple[int, int]:
        """Length and CRC-32C of an encoded frame."""
        _, _, length, crc = self.index.frames[camera][frame].item()
        return length, crc

    def _read(self, camera: str, frame: int) -> np.ndarray:
        """A frame's pixels, perhaps larger than `size`."""
        index = self.index
        file, *place = index.frames[camera][frame].item()
        path = self._paths[file]
        match index.header.cameras[camera].kind:
            case "video":
                # PyAV is an extra.
                from data_pipelines.lerobot import video

                pts, keyframe_pts = place
                return video.read_frame(path, pts, keyframe_pts)
            case "record":
                from data_pipelines.convert import step_records

                (record,) = place
                return _decode(step_records.read_frame(path, record, camera), self.size)
            case _:
                offset, length, crc = place
                data = storage.read_range(path, offset, length)
                if google_crc32c.value(data) != crc:
                    raise ValueError(
                        f"the frame's bytes ({length} at {offset}) are not those that were "
                        f"indexed: the file is damaged or another one"
                    )
                return _decode(data, self.size)


def decode_image(data: bytes, where: str) -> np.ndarray:
    """An encoded frame as uint8[H, W, 3], RGB.

    JPEGs are decoded with the fast integer DCT: to the bit what TensorFlow's decoder gives, and so
    what policies trained through tf.data have seen. Other formats go through Pillow.

    Args:
      data: a JPEG, PNG or whatever else Pillow reads.
      where: names the frame in messages.
    """
    try:
        return _decode(data, None)
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


def _decode(data: bytes, size: tuple[int, int] | None) -> np.ndarray:
    """An encoded frame's pixels; of a JPEG larger than `size`, the smallest that are not smaller
    and that the DCT's scaling (by eighths) gives, which saves most of the decoding."""
    try:
        if _is_jpeg(data):
            height, width = size or (0, 0)  # 0: no scaling
            return simplejpeg.decode_jpeg(
                data, "RGB", fastdct=True, fastupsample=False, min_height=height, min_width=width
            )
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except _BROKEN as error:
        raise ValueError(f"the frame cannot be decoded ({error})") from error


def _is_jpeg(data: bytes) -> bool:
    """True if the data starts as a JPEG does, a truncated one too: decoding it then says so."""
    return data[:2] == b"\xff\xd8"


def _px(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} px (height x width)"
