"""One figure of reports over topologies: memory, time, MFU and what a device sends.

From slices of 8 chips to slices of 512, with as many rows a device, the first and the last panel
show how a recipe scales: both should be flat. Lines join slices of one kind of chip; a chip's
memory is marked above them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lara_jax.aot.chips import GIB

SUFFIXES = (".svg", ".png")
COLOURS = ("#3b6fb6", "#d1802a", "#3a8f5c", "#a3487f", "#6f6f6f", "#b8a12e")

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """A title with a unit, and the number that a report has for it; None where it has none."""

    title: str
    value: Callable[[Report], float | None]


PANELS = (
    Panel("peak memory, GiB a device", lambda r: _scaled(r, "peak_memory_bytes", 1 / GIB)),
    Panel("step, ms at least", lambda r: _scaled(r, "estimated_step_seconds", 1e3)),
    Panel("MFU, % at most", lambda r: _scaled(r, "mfu", 1e2)),
    Panel("sent in a step, GB a device", lambda r: _scaled(r, "collective_bytes", 1e-9)),
)


def check_path(path: Path) -> None:
    """Refuses a name that no figure can have.

    Raises:
      ValueError: its suffix is not known.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--plot {path}: a figure ends in {' or '.join(SUFFIXES)}")


def plot_reports(series: Mapping[str, Sequence[Report]], path: Path) -> None:
    """Draws reports over topologies, in the order in which these first come.

    Args:
      series: reports of `lara aot --json` by the name of their line.
      path: the SVG or PNG to write.

    Raises:
      ValueError: another suffix, or no report.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_path(path)
    names = list(dict.fromkeys(place(report) for reports in series.values() for report in reports))
    if not names:
        raise ValueError("there is no report to plot")
    figure = Figure(figsize=(max(7.0, 1.0 + 1.1 * len(names)), 9.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, panel in zip(panels, PANELS, strict=True):
        for number, (label, reports) in enumerate(series.items()):
            colour = COLOURS[number % len(COLOURS)]
            for at, values in _lines(reports, names, panel):
                axes.plot(at, values, "o-", color=colour, label=label, ms=4)
        axes.set_title(panel.title, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for report in (report for reports in series.values() for report in reports):
        if "hbm_bytes" in report:
            x, hbm = names.index(place(report)), report["hbm_bytes"] / GIB
            panels[0].plot([x - 0.3, x + 0.3], [hbm, hbm], color="#a00", linewidth=1.5)
    for axes in panels:
        axes.set_ylim(bottom=0)
    panels[-1].set_xticks(range(len(names)), names, fontsize=8)
    if len(series) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        figure.legend(
            [*once.values()],
            [*once],
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize=8,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _lines(
    reports: Sequence[Report], names: Sequence[str], panel: Panel
) -> Iterator[tuple[list[int], list[float]]]:
    """Places and values, a line for each run of neighbours with the same chip."""
    by_place = {names.index(place(report)): report for report in reports}
    for _, run in groupby(sorted(by_place), key=lambda at: by_place[at]["topology"].split(":")[0]):
        values = [(at, panel.value(by_place[at])) for at in run]
        known = [(at, value) for at, value in values if value is not None]
        yield [at for at, _ in known], [value for _, value in known]


def place(report: Report) -> str:
    """The slices of a report and how many devices they are, in two lines."""
    slices, devices = report["num_slices"], report["devices"]
    several = f"{slices} x " if slices > 1 else ""
    return f"{several}{report['topology']}\n{devices} devices"


def _scaled(report: Report, name: str, factor: float) -> float | None:
    value = report.get(name)
    return None if value is None else factor * value
