"""`lara data inspect`: one HTML page that shows what a dataset, or a mixture of them, holds.

    the mixture's sets, steps, weights, shares          (where there are several)
    per set: what it is | what filters leave out | statistics and histograms | its instructions
             sample episodes: frames with boxes and reasoning, actions before and after scaling

The page is one file: pictures are part of it, and it loads and runs nothing.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape

import numpy as np
from tqdm import tqdm

from data_pipelines import catalog
from data_pipelines.catalog import Part
from data_pipelines.cli import option
from data_pipelines.frames import FrameReader
from data_pipelines.index.format import FLAGS, Index
from data_pipelines.inspect_figures import (
    SCALED,
    curve,
    frame,
    grid,
    histogram,
    save_page,
    table,
)
from data_pipelines.statistics import (
    COLUMNS,
    DatasetStatistics,
    index_statistics,
    normalizers,
)
from data_pipelines.storage import local_path
from lara_jax.tokenizers.prompt import Annotation

EPISODES = 3
FRAMES = 8
INSTRUCTIONS = 20
HISTOGRAM_ROWS = 200_000
CHUNK_ROWS = 1 << 18
EEF_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a set amounts to.

    Attributes:
      dataset, split: its name and part.
      episodes, rows, stored_steps, dropped_steps: of the part.
      empty_episodes: of the whole split.
      flags: rows that carry each flag; a row may carry several.
      steps: rows that the filters leave.
      weight: in the mixture.
      share: of the samples of an epoch: weight times steps, over all sets.
      broken_frames: sample frames that could not be shown.
    """

    dataset: str
    split: str
    episodes: int
    rows: int
    stored_steps: int
    dropped_steps: int
    empty_episodes: int
    flags: dict[str, int]
    steps: int
    weight: float
    share: float
    broken_frames: int = 0


def write_page(
    parts: Sequence[Part],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] = (),
    title: str = "",
    filters: Sequence[str] = (),
    episodes: int = EPISODES,
) -> list[Summary]:
    """Writes the page of a dataset or of a mixture.

    Args:
      parts: of the sets, one for each.
      out: the HTML file.
      weights: of the sets; all 1 if there are none.
      title: the page's heading; the sets' names where it is empty.
      filters: names of FLAGS that leave rows out of statistics and steps.
      episodes: how many to show of each set, evenly spread over it.

    Returns:
      What the sets amount to.

    Raises:
      ValueError: no set, weights that do not fit, or a set without steps.
    """
    weights = tuple(weights) or (1.0,) * len(parts)
    if not parts or len(weights) != len(parts):
        raise ValueError(f"{len(parts)} sets and {len(weights)} weights; expected one for each")
    bad = [weight for weight in weights if not 0 < weight < float("inf")]
    if bad:
        raise ValueError(f"weights {bad}: they must be positive")
    if episodes < 0:
        raise ValueError(f"{episodes} episodes; at least 0")
    title = title or ", ".join(part.index.spec.name for part in parts)
    statistics = [
        index_statistics(part.index, filters=filters, episodes=part.episodes) for part in parts
    ]
    mass = [weight * found.steps for weight, found in zip(weights, statistics, strict=True)]
    summaries, sections = [], []
    sets = tqdm(
        list(zip(parts, statistics, weights, mass, strict=True)),
        desc="inspecting", unit=" sets", delay=1, file=sys.stderr,
    )  # fmt: skip
    for part, found, weight, own in sets:
        films = [_episode(part.index, number, found) for number in _spread(part, episodes)]
        summaries.append(
            _summary(part, found, weight, own / sum(mass), sum(broken for _, broken in films))
        )
        body = [_dataset(part, found, summaries[-1], filters), *(film for film, _ in films)]
        sections.append("\n".join(body))
    if len(parts) > 1:
        sections.insert(0, _mixture(summaries))
    save_page(out, title, sections)
    return summaries


def _summary(
    part: Part, found: DatasetStatistics, weight: float, share: float, broken: int
) -> Summary:
    header, flags = part.index.header, part.index.rows["flags"][part.rows]
    return Summary(
        dataset=header.dataset,
        split=part.split or header.split,
        **part.counts,
        empty_episodes=header.counts["empty_episodes"],
        flags={name: int(np.count_nonzero(flags & bit)) for name, bit in FLAGS.items()},
        steps=found.steps,
        weight=weight,
        share=share,
        broken_frames=broken,
    )


def _mixture(summaries: Sequence[Summary]) -> str:
    """The table of the sets."""
    rows = [[s.dataset, s.episodes, s.steps, s.weight, _percent(s.share)] for s in summaries]
    return "<h2>Mixture</h2>\n" + table(
        ["set", "episodes", "steps", "weight", "share of the samples"], rows
    )


def _dataset(part: Part, found: DatasetStatistics, summary: Summary, filters: Sequence[str]) -> str:
    """All of a set but its sample episodes."""
    index = part.index
    spec, header = index.spec, index.header
    facts = {
        "version, split": f"{header.version}, {summary.split}",
        "source": index.source,
        "robot": spec.robot,
        "control rate": f"{spec.control_hz:g} Hz" if spec.control_hz else "unknown",
        "action": f"{spec.action_encoding}, {spec.action_dim} wide: {', '.join(spec.action)}",
        "state": f"{spec.state_encoding}, {spec.state_dim} wide: {', '.join(spec.state)}",
        "gripper": spec.gripper,
        "cameras": "; ".join(_cameras(index)),
        "language": spec.language,
        "rules on episodes": ", ".join(spec.rows),
        "annotations": ", ".join(f"{k}: {v}" for k, v in header.annotations.items()),
        "quirks": spec.quirks,
        "published at": spec.location,
        "described in": spec.source,
        "licence": spec.licence,
        "index": header.digest,
    }
    counted: list[Sequence[object]] = [
        ["episodes", summary.episodes, ""],
        ["episodes of the split without a step", summary.empty_episodes, "left out"],
        ["stored steps", summary.stored_steps, ""],
        ["of them no rows by the set's rules", summary.dropped_steps, "left out"],
        *(
            [f"flagged {name}", count, "left out" if name in filters else ""]
            for name, count in summary.flags.items()
        ),
        [f"steps left (filters: {', '.join(filters) or 'none'})", found.steps, ""],
    ]
    instructions, distinct = _instructions(part)
    listed = [[text, count, _percent(count / summary.rows)] for text, count in instructions]
    parts = [
        f"<h2>{escape(spec.name)}</h2>",
        table((), [(name, value) for name, value in facts.items() if value]),
        "<h3>What there is and what is left out</h3>",
        table(["", "count", ""], counted),
        "<h3>Statistics</h3>",
        *_statistics(part, found, filters),
        f"<h3>Instructions: {distinct} different ones</h3>",
        table(["the most frequent", "steps", "share"], listed),
    ]
    return "\n".join(parts)


def _cameras(index: Index) -> Iterator[str]:
    """Each camera in words: "image_0 (primary), encoded, 256x256 px"."""
    roles = {camera: role for role, camera in index.spec.roles.items()}
    for name, camera in index.header.cameras.items():
        role = f" ({roles[name]})" if name in roles else ""
        yield f"{name}{role}, {camera.kind}, {camera.height}x{camera.width} px (height x width)"


def _statistics(part: Part, found: DatasetStatistics, filters: Sequence[str]) -> Iterator[str]:
    """Tables and histograms of actions and states."""
    index = part.index
    every = max(1, -(-part.counts["rows"] // HISTOGRAM_ROWS))
    bits = sum(FLAGS[name] for name in set(filters))
    kept = (index.rows["flags"][part.rows][::every] & bits) == 0
    for name, vector, modes in (
        ("action", found.action, found.action_modes),
        ("state", found.state, found.state_modes),
    ):
        names = _dimensions(index, name)
        columns = zip(names, modes, *(getattr(vector, c) for c in COLUMNS), strict=True)
        yield table([name, "normalised by", *COLUMNS], [list(row) for row in columns])
        values = (index.actions if name == "action" else index.states)[part.rows][::every][kept]
        extents = zip(vector.min, vector.q01, vector.q99, vector.max, strict=True)
        yield grid(
            histogram(column, dimension, extent=extent)
            for column, dimension, extent in zip(values.T, names, extents, strict=True)
        )
    which = "every step" if every == 1 else f"step 1 of every {every}"
    yield (
        f'<p class="note">The histograms count {which} on a logarithmic scale; the dashed lines '
        "are q01 and q99; the outermost bars hold all that lies beyond.</p>"
    )


def _instructions(part: Part) -> tuple[list[tuple[str, int]], int]:
    """The most frequent instructions with their steps, and how many different ones there are."""
    index = part.index
    counts: Counter[int] = Counter()
    rows: dict[int, int] = {}
    for start in range(part.rows.start, part.rows.stop, CHUNK_ROWS):
        end = min(start + CHUNK_ROWS, part.rows.stop)
        texts = index.array("rows.bin")["instruction"][start:end]
        numbers, first, steps = np.unique(texts, return_index=True, return_counts=True)
        counts.update(dict(zip(numbers.tolist(), steps.tolist(), strict=True)))
        for number, row in zip(numbers.tolist(), first.tolist(), strict=True):
            rows.setdefault(number, start + row)
    top = [
        (index.instruction(rows[number]) or "(none)", count)
        for number, count in counts.most_common(INSTRUCTIONS)
    ]
    return top, len(counts)


def _spread(part: Part, count: int) -> list[int]:
    """Numbers of `count` episodes, evenly spread, or of all."""
    numbers = np.arange(len(part.index.episodes))[part.episodes]
    return np.unique(numbers[np.linspace(0, len(numbers) - 1, count).astype(int)]).tolist()


def _episode(index: Index, number: int, found: DatasetStatistics) -> tuple[str, int]:
    """A sample episode, and how many of its frames could not be shown."""
    episode = index.episodes[number]
    first, count = int(episode["first_row"]), int(episode["rows"])
    shown = np.unique(np.linspace(first, first + count - 1, FRAMES).astype(int)).tolist()
    success = {1: ", a success", 0: ", a failure", -1: ""}[int(episode["success"])]
    key = index.key(number)
    parts = [
        f"<h3>Episode {number}{': ' if key else ''}{escape(key)}</h3>",
        f"<p>{escape(index.instruction(first) or '(no instruction)')} "
        f'<span class="note">({count} steps{success})</span></p>',
    ]
    primary = index.spec.roles.get("primary", next(iter(index.header.cameras), ""))
    broken = 0
    for camera in index.header.cameras:
        figures = [_frame(index, row, camera, primary=camera == primary) for row in shown]
        broken += sum(bad for _, bad in figures)
        strip = "\n".join(figure for figure, _ in figures)
        parts.append(f'<p class="note">{escape(camera)}</p><div class="film">\n{strip}\n</div>')
    actions = np.array(index.actions[first : first + count])
    scaled = normalizers(found)[0].normalize(actions)
    names = _dimensions(index, "action")
    parts += [
        '<p class="note">Actions as they are stored, least and greatest value below:</p>',
        grid(curve(v, name) for v, name in zip(actions.T, names, strict=True)),
        '<p class="note">and normalised, as the model sees them, from -1 to 1 at least:</p>',
        grid(
            curve(v, name, colour=SCALED, extent=(-1, 1))
            for v, name in zip(scaled.T, names, strict=True)
        ),
    ]
    return "\n".join(parts), broken


def _frame(index: Index, row: int, camera: str, *, primary: bool) -> tuple[str, bool]:
    """A frame with what is said of it, on the primary camera; True if it could not be shown."""
    step = int(index.rows[row]["frame"])
    words, boxes = [f"step {step}"], Annotation().boxes
    if primary:
        flags, annotation = int(index.rows[row]["flags"]), index.annotation(row) or Annotation()
        words += [name for name, bit in FLAGS.items() if flags & bit]
        words += filter(None, (annotation.subtask, annotation.motion))
        boxes = annotation.boxes
    caption = f"<figcaption>{'<br>'.join(escape(word) for word in words)}</figcaption>"
    stored = int(index.episode_of(row)["first_frame"]) + step
    try:
        pixels = FrameReader(index).image(camera, stored)
    except ValueError as error:
        # What is wrong with a frame is what one may look at this page for.
        return f'<figure><div class="broken">{escape(str(error))}</div>{caption}</figure>', True
    picture = frame(pixels, boxes, f"{camera}, step {step}")
    return f"<figure>{picture}{caption}</figure>", False


def _dimensions(index: Index, vector: str) -> list[str]:
    """Names of the dimensions of the "action" or the "state"."""
    spec = index.spec
    if vector == "action" and spec.action_encoding == "EEF_POS":
        return list(EEF_NAMES)
    width = spec.action_dim if vector == "action" else spec.state_dim
    return [f"{vector}[{number}]" for number in range(width)]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def main(argv: Sequence[str]) -> int:
    """`lara data inspect`: writes the page."""
    parser = argparse.ArgumentParser(
        prog="lara data inspect",
        description="Writes one HTML page about a dataset, several, or a named mixture.",
    )
    parser.add_argument(
        "data",
        nargs="+",
        help="datasets' version directories, URLs, or indexes' folders; "
        "with --mixture, the folder that holds its datasets by name",
    )
    parser.add_argument("--mixture", metavar="NAME", help="built in or from --definitions")
    parser.add_argument("--weights", type=float, nargs="+", default=[], metavar="W", help="of DATA")
    parser.add_argument("--name", help="of the one dataset (default: what its files say)")
    parser.add_argument("--definitions", metavar="FILE", help="sets of your own (TOML)")
    parser.add_argument(
        "--split", default="train", help="of each dataset, such as train[:95%%] (default: train)"
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        choices=FLAGS,
        help="steps to leave out; repeatable",
    )
    parser.add_argument("--episodes", type=int, default=EPISODES, help="to show of each dataset")
    parser.add_argument(
        "--out", type=option(local_path), default="page.html", help="default: page.html"
    )
    parser.add_argument("--json", action="store_true", help="print a line for each dataset")
    arguments = parser.parse_args(argv)
    definitions, weights = arguments.definitions or "", arguments.weights
    name = arguments.name or ""
    if name and len(arguments.data) > 1:
        raise ValueError(f"--name {name} is of one dataset; {len(arguments.data)} are given")
    entries = [entry for path in arguments.data for entry in catalog.entries(path, name=name)]
    if arguments.mixture is not None:
        if len(entries) != 1 or weights:
            raise ValueError("--mixture: give the one folder that holds its datasets, no weights")
        (root,) = arguments.data
        entries = list(
            catalog.entries(root, name=name, mixture=arguments.mixture, definitions=definitions)
        )
        weights = [entry.weight for entry in entries]
    summaries = write_page(
        [catalog.open_part(e, arguments.split, definitions=definitions) for e in entries],
        arguments.out,
        weights=weights,
        title=arguments.mixture or "",
        filters=arguments.filter,
        episodes=arguments.episodes,
    )
    if arguments.json:
        for summary in summaries:
            print(json.dumps({**asdict(summary), "page": str(arguments.out)}))
    else:
        print(f"{arguments.out}: {len(summaries)} sets, {sum(s.steps for s in summaries):,} steps")
    return 0
