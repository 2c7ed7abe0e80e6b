"""`lara report`: one HTML page that shows what a run has learnt, while it trains or afterwards.

    metrics.csv                     curves of the run, coloured by stage
    datasets.csv                    losses of each dataset
    eval.csv                        held-out losses, action error in physical units, slot statistics
    eval/<stage>/<dataset>/*.npz    predicted against true actions, imagined next frames

    checkpoints/<step>/recipe       its settings

It reads these files and nothing else: no model, no device, no data set. What a run has not written
is left out. The page is one file: pictures are part of it, and it loads and runs nothing.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from data_pipelines.inspect_figures import (
    RAW,
    SCALED,
    Line,
    frame,
    grid,
    lines,
    save_page,
    table,
)
from lara_jax import checkpoint
from lara_jax.config import recipe_to_dict
from lara_jax.evals.report import (
    STAGE_COLOURS,
    Curve,
    read_curves,
    read_scores,
    sample_files,
    smooth,
)
from lara_jax.metrics import COLUMNS
from lara_jax.plain_values import dotted

# Metric -> what people read, and the factor that brings it to that unit.
UNITS: Mapping[str, tuple[str, float]] = {
    "position_m": ("position error, mm", 1e3),
    "rotation_rad": ("rotation error, mrad", 1e3),
    "gripper_accuracy": ("gripper right, %", 1e2),
    "action_error": ("action error, the data's units", 1.0),
}
SLOTS: Mapping[str, tuple[str, float]] = {
    "slot_rank": ("effective rank of slots", 1.0),
    "slot_cosine": ("cosine between slots", 1.0),
    "slot_drift": ("drift since the evaluation before", 1.0),
    "imagined_rank": ("effective rank of imagined frames", 1.0),
    "imagined_right": ("own next frame nearest, %", 1e2),
}
# Source: arXiv 2602.01166, which does not say over which vectors its rank is taken.
PAPER_RANKS = {"paper, with the EMA teacher": 6.76, "paper, without": 5.10}
AXES = ("dx (m)", "dy (m)", "dz (m)", "droll", "dpitch", "dyaw (rad)", "gripper")
CHUNKS = 4
Scores = Mapping[str, Sequence[Curve]]


def write_report(workdir: Path, out: Path) -> Path:
    """Writes the page of a run.

    Args:
      workdir: the run's directory.
      out: the HTML file.

    Returns:
      The file.

    Raises:
      FileNotFoundError: there is no `metrics.csv`.
      ValueError: it holds no row yet.
    """
    curves = read_curves(workdir / "metrics.csv", metrics=COLUMNS[2:])
    stages = list(dict.fromkeys(curve.stage for curve in curves))
    held_out = read_scores(workdir / "eval.csv")
    sections = [
        _legend(stages),
        *_curves("Training", curves, stages),
        *_per_dataset("Training, by dataset", read_scores(workdir / "datasets.csv"), stages),
        *action_section(held_out),
        *slot_section(held_out),
        *_per_dataset("Held out, by dataset", held_out, stages),
        *_samples(workdir / "eval", stages),
        *_settings(workdir),
    ]
    steps = max(int(curve.steps[-1]) for curve in curves)
    save_page(out, f"{workdir.absolute().name}, step {steps}", sections)
    return out


def _legend(stages: Sequence[str]) -> str:
    marks = [f'<b style="color:{_colour(stages, stage)}">{escape(stage)}</b>' for stage in stages]
    return f'<p class="note">stages: {", ".join(marks)}; numbers below a plot are its range</p>'


def _colour(stages: Sequence[str], stage: str) -> str:
    """The colour of a stage; one that has no row of metrics yet comes after the others."""
    number = stages.index(stage) if stage in stages else len(stages)
    return STAGE_COLOURS[number % len(STAGE_COLOURS)]


def _curves(title: str, curves: Sequence[Curve], stages: Sequence[str]) -> Iterator[str]:
    """A plot per metric, its stages one after the other."""
    yield f"<h2>{escape(title)}</h2>"
    yield grid(_plot(m, curves, stages) for m in dict.fromkeys(c.metric for c in curves))


def _per_dataset(title: str, scores: Scores, stages: Sequence[str]) -> Iterator[str]:
    if scores:
        yield f"<h2>{escape(title)}</h2>"
    for dataset, curves in scores.items():
        yield f"<h3>{escape(dataset)}</h3>"
        yield grid(_plot(m, curves, stages) for m in dict.fromkeys(c.metric for c in curves))


def _plot(metric: str, curves: Sequence[Curve], stages: Sequence[str]) -> str:
    drawn = []
    for curve in curves:
        if curve.metric == metric:
            colour = _colour(stages, curve.stage)
            drawn.append(Line(curve.steps, curve.values, colour, width=0.8, opacity=0.35))
            drawn.append(Line(curve.steps, smooth(curve.values), colour, width=1.5))
    return lines(drawn, metric)


def action_section(scores: Scores) -> Iterator[str]:
    """The last held-out action error of each stage that acts, beside the mean action's."""
    rows = []
    for dataset, curves in scores.items():
        last = {(c.stage, c.metric): (int(c.steps[-1]), float(c.values[-1])) for c in curves}
        for (stage, metric), (step, value) in last.items():
            if metric in UNITS:
                name, factor = UNITS[metric]
                _, mean = last[stage, f"mean_action_{metric}"]
                rows.append([dataset, stage, step, name, factor * value, factor * mean])
    if rows:
        yield "<h2>Held-out action error</h2>"
        yield table(["dataset", "stage", "step", "", "policy", "always the mean action"], rows)


def slot_section(scores: Scores) -> Iterator[str]:
    """The last slot statistics of each stage, beside the paper's effective ranks."""
    rows: list[list[object]] = []
    for dataset, curves in scores.items():
        last = {(c.stage, c.metric): (int(c.steps[-1]), float(c.values[-1])) for c in curves}
        for stage in dict.fromkeys(stage for stage, metric in last if metric in SLOTS):
            cells = [last.get((stage, metric)) for metric in SLOTS]
            factors = [factor for _, factor in SLOTS.values()]
            shown = [f * cell[1] if cell else "" for cell, f in zip(cells, factors, strict=True)]
            step = max(cell[0] for cell in cells if cell)
            rows.append([dataset, stage, step, *shown])
    if not rows:
        return
    rows += [[name, "", "", rank, *[""] * (len(SLOTS) - 1)] for name, rank in PAPER_RANKS.items()]
    yield "<h2>Latent thoughts</h2>"
    yield table(["dataset", "stage", "step", *(name for name, _ in SLOTS.values())], rows)
    yield (
        '<p class="note">Effective rank: exp of the entropy of the normalised singular values of '
        "all held-out rows' vectors less their mean (Roy and Vetterli, 2007). The paper does not "
        "say over which vectors its rank is taken: compare the trend, not the number.</p>"
    )


def _samples(folder: Path, stages: Sequence[str]) -> Iterator[str]:
    """What the newest evaluation of each stage has kept, the last stage first."""
    for stage in reversed(stages):
        for path in sorted((folder / stage).glob("*/")):
            files = sample_files(path)
            if files:
                step, newest = list(files.items())[-1]
                body = list(sample_section(dict(np.load(newest))))
                if body:
                    yield f"<h2>{escape(path.name)}, {escape(stage)}, step {step}</h2>"
                    yield from body


def _settings(workdir: Path) -> Iterator[str]:
    """The recipe of the newest checkpoint, folded away."""
    if not checkpoint.steps(workdir / "checkpoints"):
        return
    try:
        settings = dotted(recipe_to_dict(checkpoint.load_info(workdir).recipe))
    except (OSError, ValueError) as error:
        yield f'<p class="note">The settings could not be read: {escape(str(error))}</p>'
        return
    rows = [[key, str(value)] for key, value in settings.items()]
    yield f"<details><summary>Settings</summary>{table((), rows)}</details>"


def sample_section(samples: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Chunks and frames of a file of samples (`lara_jax.evals.held_out`)."""
    if "predicted" in samples:
        yield (
            f'<h3>Actions: <b style="color:{RAW}">true</b> and '
            f'<b style="color:{SCALED}">predicted</b>, over the chunk</h3>'
        )
        for row in range(min(CHUNKS, len(samples["predicted"]))):
            yield grid(_chunk(*(samples[n][row] for n in ("predicted", "target", "mask"))))
    if "right" in samples:
        yield "<h3>Imagined next frames: which held-out frame is nearest</h3>"
        yield grid(_film(samples, row) for row in range(len(samples["right"])))


def _chunk(predicted: np.ndarray, target: np.ndarray, mask: np.ndarray) -> Iterator[str]:
    """A plot for each dimension of a chunk, float[C, A] and bool[C], where it is the data's own."""
    steps = np.flatnonzero(mask)
    width = target.shape[1]
    names = AXES if width == len(AXES) else [f"action[{number}]" for number in range(width)]
    for number, name in enumerate(names):
        true, guess = target[mask, number], predicted[mask, number]
        yield lines([Line(steps, true, RAW), Line(steps, guess, SCALED)], name)


def _film(samples: Mapping[str, np.ndarray], row: int) -> str:
    """The frame, the true next one, and the one that the imagined frame is nearest to."""
    nearest = "its own next" if samples["right"][row] else "another step's next"
    shown = {"frames": "now", "next_frames": "next", "nearest_frames": f"imagined: {nearest}"}
    pictures = [
        f"<figure>{frame(samples[name][row], (), words)}<figcaption>{words}</figcaption></figure>"
        for name, words in shown.items()
    ]
    film = f'<div class="film">{"".join(pictures)}</div>'
    words = escape(str(samples["words"][row]))
    return f'<div style="margin:0 1.5em 1em 0">{film}<p class="note">{words}</p></div>'


def main(argv: Sequence[str]) -> int:
    """`lara report`: writes the page."""
    parser = argparse.ArgumentParser(
        prog="lara report", description="Writes one HTML page about a run.", allow_abbrev=False
    )
    parser.add_argument("--workdir", required=True, type=Path, help="the run's directory")
    parser.add_argument("--out", type=Path, help="the page (default: DIR/report.html)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.workdir / "report.html"
    print(write_report(arguments.workdir, out))
    return 0
