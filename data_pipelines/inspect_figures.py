"""Pages that are one file, and what they show: `lara data inspect`, `lara report`.

Frames are JPEGs inside the page; plots are SVG, written out here: hundreds of them make a page, and
a line or sixty bars are soon drawn.
"""

import base64
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

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
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1250px; color: #222;
       padding: 0 1em; }
h1, h2, h3 { line-height: 1.2; } h2 { border-bottom: 2px solid #3b6fb6; margin-top: 2em; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { padding: .15em .7em; border-bottom: 1px solid #ddd; text-align: left;
         vertical-align: top; overflow-wrap: anywhere; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg text { fill: #555; } .grid { display: flex; flex-wrap: wrap; gap: 4px; }
.film { display: flex; overflow-x: auto; gap: .4em; }
figure { margin: 0; flex: none; } figcaption { font-size: 12px; max-width: 220px; }
.broken { width: 160px; color: #a00; font-size: 12px; } .note { color: #666; }
"""


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
    return lines([Line(np.arange(len(values)), values, colour)], name, extent=extent)


@dataclass(frozen=True)
class Line:
    """float[n] places and values, n at least 1, its colour, width in px and opacity."""

    x: np.ndarray
    y: np.ndarray
    colour: str = RAW
    width: float = 1.3
    opacity: float = 1.0


def lines(drawn: Sequence[Line], name: str, *, extent: tuple[float, float] | None = None) -> str:
    """Lines in one plot, its least and greatest value below it.

    Args:
      drawn: at least one; of more than POINTS points, every second, third, ... is drawn.
      name: stands above.
      extent: what to show at least; None for the range of the values.

    Returns:
      An svg element.
    """
    low, high = _range([line.y for line in drawn], *(extent or ()))
    left, right = _range([line.x for line in drawn])
    parts = []
    for line in drawn:
        every = slice(None, None, -(-len(line.y) // POINTS))
        x = LEFT + _share(line.x[every], left, right) * (RIGHT - LEFT)
        y = BOTTOM - _share(line.y[every], low, high) * (BOTTOM - TOP)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        faint = "" if line.opacity == 1 else f' opacity="{line.opacity:g}"'
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{line.colour}" '
            f'stroke-width="{line.width:g}"{faint}/>'
        )
    return _plot(name, "".join(parts), f"{low:.3g}", f"{high:.3g}")


def _range(values: Sequence[np.ndarray], *others: float) -> tuple[float, float]:
    shown = [float(bound) for v in values for bound in (v.min(), v.max())]
    return min(*shown, *others), max(*shown, *others)


def _share(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Places between low and high, 0 to 1; the middle where there is nothing between."""
    values = values.astype(np.float64)
    return (values - low) / (high - low) if high > low else np.full(len(values), 0.5)


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


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; numbers to the right, floats with five digits."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = [f"<tr>{head}</tr>"] if header else []
    lines += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _cell(value: object) -> str:
    if isinstance(value, int | float):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
        return f'<td class="n">{text}</td>'
    return f"<td>{escape(str(value))}</td>"


def grid(pictures: Iterable[str]) -> str:
    """Pictures side by side."""
    return '<div class="grid">' + "\n".join(pictures) + "</div>"


def save_page(out: str | os.PathLike[str], title: str, sections: Iterable[str]) -> None:
    """Writes sections of HTML as a page that loads and runs nothing."""
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
