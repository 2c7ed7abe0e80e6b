"""Pictures for `lara data inspect`, each a piece of HTML that needs no other file.

Frames are JPEGs inside the page; plots are SVG, written out here: hundreds of them make a page, and
a line or sixty bars are soon drawn.
"""

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image, ImageDraw

from lara_jax.evals.report import STAGE_COLOURS
from lara_jax.tokenizers.prompt import Box

FRAME_PX = 160
# The object to handle, then the destination.
BOX_COLOURS = ("#ff9d1c", "#2ab8ff")
RAW, SCALED = STAGE_COLOURS[:2]
# Of a plot, px: the whole, and the part of it that is drawn in.
WIDTH, HEIGHT = 164, 104
LEFT, RIGHT, TOP, BOTTOM = 2, WIDTH - 2, 18, HEIGHT - 14
POINTS = 400
BINS = 60


def frame(pixels: np.ndarray, boxes: Sequence[Box], alt: str) -> str:
    """A frame at the page's size with boxes drawn on it.

    Args:
      pixels: uint8[H, W, 3].
      boxes: normalised (x1, y1, x2, y2); what lies outside the frame is not seen.
      alt: says in words what it is.

    Returns:
      An img element with a JPEG, FRAME_PX high.
    """
    height, width = pixels.shape[:2]
    size = max(1, round(width * FRAME_PX / height)), FRAME_PX
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for number, box in enumerate(boxes):
        corners = np.sort(np.reshape(box, (2, 2)), axis=0) * (np.array(size) - 1)
        # Drawing far beyond the frame takes time and shows nothing.
        corners = np.clip(corners, -3, np.array(size) + 2)
        draw.rectangle(corners.ravel().tolist(), outline=BOX_COLOURS[number % 2], width=2)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}">'


def curve(
    values: np.ndarray, name: str, *, colour: str = RAW, extent: tuple[float, float] | None = None
) -> str:
    """A line over time, the plot's least and greatest value below it.

    Args:
      values: float[n], n at least 1; of more than POINTS, every second, third, ... is drawn.
      name: stands above.
      colour: of the line.
      extent: what to show at least; None for the range of the values.

    Returns:
      An svg element.
    """
    shown = [float(values.min()), float(values.max()), *(extent or ())]
    low, high = min(shown), max(shown)
    drawn = values[:: -(-len(values) // POINTS)].astype(np.float64)
    x = np.linspace(LEFT, RIGHT, len(drawn))
    share = (drawn - low) / (high - low) if high > low else np.full(len(drawn), 0.5)
    y = BOTTOM - share * (BOTTOM - TOP)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    line = f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.3"/>'
    return _plot(name, line, f"{low:.3g}", f"{high:.3g}")


def histogram(values: np.ndarray, name: str, *, extent: tuple[float, float, float, float]) -> str:
    """How often each value comes up, on a logarithmic scale, q01 and q99 marked.

    The range is that of q01 to q99, and as much again to each side where the data goes so far; what
    lies beyond is counted in the outermost bars.

    Args:
      values: float[n].
      name: stands above.
      extent: min, q01, q99 and max of the whole dataset.

    Returns:
      An svg element; its bars are one path.
    """
    low, q01, q99, high = extent
    left, right = max(low, 2 * q01 - q99), min(high, 2 * q99 - q01)
    if left == right:
        left, right = left - 0.5, right + 0.5
    counts, _ = np.histogram(np.clip(values.astype(np.float64), left, right), BINS, (left, right))
    heights = np.log1p(counts) / np.log1p(max(1, counts.max())) * (BOTTOM - TOP)
    edges = np.linspace(LEFT, RIGHT, BINS + 1)
    bars = "".join(
        f"M{a:.1f} {BOTTOM}V{BOTTOM - h:.1f}H{b:.1f}V{BOTTOM}"
        for a, b, h in zip(edges[:-1], edges[1:], heights, strict=True)
        if h
    )
    drawn = f'<path d="{bars}" fill="{RAW}"/>'
    for quantile in (q01, q99):
        x = LEFT + (quantile - left) / (right - left) * (RIGHT - LEFT)
        drawn += (
            f'<path d="M{x:.1f} {TOP}V{BOTTOM}" stroke="{SCALED}" stroke-width="1.3" '
            'stroke-dasharray="3 2"/>'
        )
    return _plot(name, drawn, f"{left:.3g}", f"{right:.3g}")


def _plot(name: str, drawn: str, left: str, right: str) -> str:
    """Something drawn, its name above and a number at each side below."""
    text = '<text x="{}" y="{}" font-size="{}" text-anchor="{}">{}</text>'
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        + text.format(LEFT, 12, 11, "start", escape(name))
        + f'<path d="M{LEFT} {BOTTOM}H{RIGHT}" stroke="#bbb"/>'
        + drawn
        + text.format(LEFT, HEIGHT - 3, 9, "start", left)
        + text.format(RIGHT, HEIGHT - 3, 9, "end", right)
        + "</svg>"
    )
