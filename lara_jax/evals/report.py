"""What a run shows for itself: aligned tables, a plot of the losses, an animation of episodes."""

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE_PX = 256
CAPTION_PX = 40
LAST_FRAME_MS = 1500
STAGE_COLOURS = ("#3b6fb6", "#d1802a", "#3a8f5c", "#a3487f", "#6f6f6f")


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain-text table: columns aligned, numbers to the right, floats with four digits.

    Args:
      header: the columns' names.
      rows: one value per column each.

    Returns:
      Lines without a final line break.

    Raises:
      ValueError: a row has another number of values than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} values, the header {len(header)}: {row}")
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        for column in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric in one stage: float64[n] steps and values, in the order of the file."""

    stage: str
    metric: str
    steps: np.ndarray
    values: np.ndarray


def read_curves(
    metrics_csv: str | os.PathLike[str], *, metrics: Sequence[str] | None = None
) -> list[Curve]:
    """Reads a metrics file: columns `step`, `stage`, then one per metric; cells may be empty.

    Args:
      metrics_csv: the file.
      metrics: which ones; by default every column whose name holds "loss".

    Returns:
      One curve per stage and metric that has a value, stages in order of appearance.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a column is missing, or nothing is there to show.
    """
    path = Path(metrics_csv)
    if not path.is_file():
        raise FileNotFoundError(f"there is no metrics file {path}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        rows = list(reader)
    wanted = list(metrics) if metrics is not None else [name for name in columns if "loss" in name]
    missing = [name for name in ("step", "stage", *wanted) if name not in columns]
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}; it has {columns}")
    curves = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        for metric in wanted:
            points = [
                (float(row["step"]), float(row[metric]))
                for row in rows
                if row["stage"] == stage and row[metric]
            ]
            if points:
                steps, values = np.array(points).T
                curves.append(Curve(stage=stage, metric=metric, steps=steps, values=values))
    if not curves:
        raise ValueError(f"{path} has no values of {wanted or 'any loss'}")
    return curves


def read_scores(scores_csv: str | os.PathLike[str]) -> dict[str, list[Curve]]:
    """Reads a file of scores: columns `step`, `stage`, `dataset`, `metric`, `value`.

    Returns:
      Each dataset's curves, in order of appearance; none where there is no file.
    """
    path = Path(scores_csv)
    if not path.is_file():
        return {}
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["dataset"], row["stage"], row["metric"]
            points.setdefault(key, []).append((float(row["step"]), float(row["value"])))
    curves: dict[str, list[Curve]] = {}
    for (dataset, stage, metric), found in points.items():
        steps, values = np.array(found).T
        curve = Curve(stage=stage, metric=metric, steps=steps, values=values)
        curves.setdefault(dataset, []).append(curve)
    return curves


def sample_files(folder: Path) -> dict[int, Path]:
    """The files of samples that evaluation has left in a folder, by step, ascending."""
    files = {int(path.stem): path for path in folder.glob("*.npz") if path.stem.isdigit()}
    return dict(sorted(files.items()))


def loss_table(curves: Sequence[Curve]) -> str:
    """First and last value of each curve.

    Returns:
      A table with the columns stage, loss, steps, first, last, change.
    """
    rows = []
    for curve in curves:
        first, last = float(curve.values[0]), float(curve.values[-1])
        change = f"{100 * (last / first - 1):+.0f} %" if first else ""
        span = f"{curve.steps[0]:.0f}-{curve.steps[-1]:.0f}"
        rows.append([curve.stage, curve.metric, span, first, last, change])
    return format_table(["stage", "loss", "steps", "first", "last", "change"], rows)


def plot_losses(curves: Sequence[Curve], path: str | os.PathLike[str]) -> None:
    """Draws one panel per metric, its stages one after the other in different colours.

    Args:
      curves: what `read_curves` returns.
      path: the PNG to write.
    """
    # No display: the figure is made and saved without pyplot's global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = list(dict.fromkeys(curve.metric for curve in curves))
    stages = list(dict.fromkeys(curve.stage for curve in curves))
    columns = len(metrics) if len(metrics) <= 3 else math.ceil(math.sqrt(len(metrics)))
    lines = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.0 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    for panel, metric in zip(panels, metrics, strict=False):
        for curve in curves:
            if curve.metric != metric:
                continue
            colour = STAGE_COLOURS[stages.index(curve.stage) % len(STAGE_COLOURS)]
            panel.plot(curve.steps, curve.values, color=colour, alpha=0.3, linewidth=0.8)
            panel.plot(curve.steps, smooth(curve.values), color=colour, linewidth=1.8)
        panel.set_title(metric, fontsize=10, loc="left")
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    handles = [
        panels[0].plot([], [], color=STAGE_COLOURS[number % len(STAGE_COLOURS)])[0]
        for number in range(len(stages))
    ]
    figure.legend(handles, stages, loc="outside lower center", ncols=len(stages), frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the curve to each side, shorter at the ends."""
    half = len(values) // 20
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def save_gif(
    path: str | os.PathLike[str],
    episodes: Sequence[tuple[Sequence[np.ndarray], str]],
    *,
    frames_per_second: int = 8,
) -> None:
    """Saves episodes side by side as an animation; shorter ones wait in their last frame.

    Args:
      path: the GIF to write.
      episodes: frames uint8[S, S, 3] and a caption of at most two lines each; an episode without
        frames is left out.
      frames_per_second: its speed.

    Raises:
      ValueError: no episode has frames.
    """
    shown = [(frames, caption) for frames, caption in episodes if len(frames)]
    if not shown:
        raise ValueError("no episode has frames to show")
    length = max(len(frames) for frames, _ in shown)
    images = []
    for time in range(length):
        tiles = [_tile(frames[min(time, len(frames) - 1)], caption) for frames, caption in shown]
        images.append(Image.fromarray(np.concatenate(tiles, axis=1)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    durations = [1000 // frames_per_second] * (length - 1) + [LAST_FRAME_MS]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def _tile(frame: np.ndarray, caption: str) -> np.ndarray:
    """A frame at the animation's size, its caption below."""
    tile = Image.new("RGB", (TILE_PX, TILE_PX + CAPTION_PX), "white")
    tile.paste(Image.fromarray(frame).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST), (0, 0))
    font = ImageFont.load_default(12)
    ImageDraw.Draw(tile).text((6, TILE_PX + 4), caption, fill="black", font=font)
    return np.asarray(tile)
