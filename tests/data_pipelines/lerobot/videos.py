"""Small videos whose every frame says which one it is, for tests."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, BITS = 48, 64, 8


def barcode(number: int) -> np.ndarray:
    """uint8[48, 64, 3]: the number as 8 vertical black or white bars, which survive compression."""
    bits = (number >> np.arange(BITS)) & 1
    row = np.repeat(bits * 220 + 16, WIDTH // BITS).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).copy()


def number_of(image: np.ndarray) -> int:
    """The inverse of `barcode`."""
    bars = image.reshape(HEIGHT, BITS, WIDTH // BITS, 3).mean(axis=(0, 2, 3)) > 128
    return int((bars * (1 << np.arange(BITS))).sum())


def write_video(
    path: Path,
    numbers: Iterable[int],
    *,
    fps: int = 5,
    gop: int = 12,
    b_frames: int = 2,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pictures: Iterable[np.ndarray] | None = None,
) -> Path:
    """A video of barcodes, or of `pictures` (uint8[H, W, 3])."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = list(pictures) if pictures is not None else [barcode(n) for n in numbers]
    with av.open(str(path), "w", options=container_options or {}) as container:
        # No key frames but those asked for, although each barcode is a new scene.
        fixed = {"sc_threshold": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=fps, options=fixed | (options or {}))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        if codec != "libsvtav1":
            stream.max_b_frames = b_frames
        for position, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = position, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def damage_packet(path: Path, position: int) -> None:
    """Flips bits in one packet (in the file's order), but for the lengths at its head."""
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        start, end = packets[position].pos, packets[position].pos + packets[position].size
    data = bytearray(path.read_bytes())
    for place in range(start + 5, end):
        data[place] ^= 0x5A
    path.write_bytes(data)
