"""Annotates one episode: anchors first, then words, boxes and motion.

    gripper command ---> phases ---------> subtask of each phase      (SubtaskWriter)
    instruction -------> objects --------> boxes of each step         (BoxDetector)
    gripper's path -----------------+----> motion text of each step

`annotate_episode` is a pure function from an episode to a line of the annotation file; so it can
run anywhere, and `inputs_fingerprint` says without running it whether a line is still right.
"""

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipelines.annotate.anchors import Segment, parse_instruction, segment_episode
from data_pipelines.annotate.motion import Axes, motion_texts
from data_pipelines.annotate.schema import SCHEMA_VERSION
from data_pipelines.annotate.view import EpisodeView, has_episode
from data_pipelines.annotate.writers import BoxDetector, SubtaskWriter, goal_of
from data_pipelines.index.format import Index
from lara_jax.tokenizers.prompt import Box

# Of the rules in this package: raise it when their results change.
RULES_VERSION = 1
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class AnnotateSettings:
    """How to annotate.

    Attributes:
      axes: the robot's frame.
      box_every_steps: look for objects in each n-th step of a phase and in its last one; steps
        between two finds get boxes in between (linearly interpolated).
    """

    axes: Axes = field(default_factory=Axes)
    box_every_steps: int = 1

    def __post_init__(self) -> None:
        if self.box_every_steps < 1:
            raise ValueError(f"box_every_steps is {self.box_every_steps}; it must be at least 1")


def inputs_fingerprint(
    view: EpisodeView,
    writer: SubtaskWriter,
    detector: BoxDetector | None,
    settings: AnnotateSettings,
) -> str:
    """Changes whenever `annotate_episode` may give another line."""
    facts = [
        RULES_VERSION,
        [view.dataset, view.split, view.key, view.number, view.fingerprint],
        [writer.name, detector.name if detector else None],
        asdict(settings),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def is_up_to_date(
    line: Mapping[str, Any],
    index: Index,
    writer: SubtaskWriter,
    detector: BoxDetector | None,
    settings: AnnotateSettings,
) -> bool:
    """True if a line of the annotation file is what `annotate_episode` would give again."""
    if not has_episode(index, line["number"]):
        return False
    view = EpisodeView.from_index(index, line["number"])
    inputs = inputs_fingerprint(view, writer, detector, settings)
    return bool(line["provenance"]["inputs"] == inputs)


def annotate_episode(
    view: EpisodeView,
    writer: SubtaskWriter,
    detector: BoxDetector | None,
    settings: AnnotateSettings,
) -> dict[str, Any]:
    """The line of an episode in the annotation file.

    Args:
      view: the episode.
      writer: puts phases into words.
      detector: finds objects; None for no boxes.
      settings: the robot's frame, how often to look.

    Returns:
      As in `data_pipelines.annotate.schema`. `provenance["missing"]` counts the steps that lack
      something, by the reason.
    """
    missing: Counter[str] = Counter()
    if view.gripper is None:
        missing["no gripper command"] = len(view)
        segments: tuple[Segment, ...] = (Segment(phase="move", start=0, stop=len(view)),)
    else:
        segments = segment_episode(view.gripper, view.positions, view.control_hz)
        missing["gripper does nothing"] = len(view) if len(segments) == 1 else 0
    subtasks = writer.subtasks(view, segments)
    if len(subtasks) != len(segments):
        raise ValueError(
            f"{view.where}: {writer.name} gave {len(subtasks)} texts for {len(segments)} segments"
        )
    if view.positions is None:
        missing["no gripper path"] = len(view)
        motions = [""] * len(view)
    else:
        motions = motion_texts(segments, view.positions, view.turns, view.control_hz, settings.axes)
    boxes = _boxes(view, segments, detector, settings.box_every_steps, missing)
    _count_words(view, segments, missing)
    steps = {}
    for segment, subtask in zip(segments, subtasks, strict=True):
        for row in range(segment.start, segment.stop):
            if subtask or motions[row] or boxes[row]:
                steps[str(view.frame[row])] = {
                    "subtask": subtask,
                    "boxes": [[round(x, 5) for x in box] for box in boxes[row]],
                    "motion": motions[row],
                    "phase": segment.phase,
                }
    return {
        "schema": SCHEMA_VERSION,
        "key": view.key,
        "number": view.number,
        "steps": steps,
        "provenance": {
            "dataset": view.dataset,
            "split": view.split,
            "stored_steps": view.stored_steps,
            "inputs": inputs_fingerprint(view, writer, detector, settings),
            "writer": writer.name,
            "detector": detector.name if detector else "none",
            "rows": len(view),
            "annotated": len(steps),
            "missing": {reason: count for reason, count in sorted(missing.items()) if count},
        },
    }


def _count_words(view: EpisodeView, segments: Sequence[Segment], missing: Counter[str]) -> None:
    """Counts the steps whose instruction says too little."""
    for segment in segments:
        steps, instruction = segment.stop - segment.start, view.instructions[segment.start]
        goals = parse_instruction(instruction)
        goal = goal_of(instruction, segment.cycle)
        if goal is None:
            missing["no instruction"] += steps
        elif not goal.verb:
            missing["instruction not understood"] += steps
        if len(goals) > 1 and segments[-1].cycle + 1 != len(goals):
            missing["goals and grasps differ in number"] += steps


def _boxes(
    view: EpisodeView,
    segments: Sequence[Segment],
    detector: BoxDetector | None,
    every: int,
    missing: Counter[str],
) -> list[tuple[Box, ...]]:
    """The boxes of each row: the object's, and the destination's if both were found."""
    boxes: list[tuple[Box, ...]] = [()] * len(view)
    if detector is None:
        missing["no detector"] = len(view)
        return boxes
    for segment in segments:
        goal = goal_of(view.instructions[segment.start], segment.cycle)
        phrases = [phrase for phrase in (goal.object, goal.destination) if phrase] if goal else []
        if goal is None or not goal.object:
            missing["no object named"] += segment.stop - segment.start
            continue
        found = _detect(view, segment, detector, phrases, every)
        for row, pair in zip(range(segment.start, segment.stop), found, strict=True):
            missing["object not found"] += pair[0] is None
            missing["destination not found"] += len(pair) > 1 and pair[1] is None
            # A destination without its object would be taken for the object.
            boxes[row] = tuple(filter(None, pair)) if pair[0] else ()
    return boxes


def _detect(
    view: EpisodeView, segment: Segment, detector: BoxDetector, phrases: Sequence[str], every: int
) -> list[tuple[Box | None, ...]]:
    """By row of a segment and phrase, the box; interpolated between rows that were looked at."""
    looked = sorted({*range(segment.start, segment.stop, every), segment.stop - 1})
    found: dict[int, Sequence[Box | None]] = {}
    for first in range(0, len(looked), _IMAGES_AT_ONCE):
        rows = looked[first : first + _IMAGES_AT_ONCE]
        answers = detector.boxes([view.image(row) for row in rows], phrases)
        found.update(zip(rows, answers, strict=True))
    filled = []
    for row in range(segment.start, segment.stop):
        before, after = looked[bisect_right(looked, row) - 1], looked[bisect_left(looked, row)]
        share = (row - before) / max(after - before, 1)
        filled.append(
            tuple(
                _between(one, other, share)
                for one, other in zip(found[before], found[after], strict=True)
            )
        )
    return filled


def _between(one: Box | None, other: Box | None, share: float) -> Box | None:
    """The box on the way from one to the other; None if either is."""
    if one is None or other is None:
        return None
    x1, y1, x2, y2 = np.asarray(one) * (1 - share) + np.asarray(other) * share
    return (float(x1), float(y1), float(x2), float(y2))


def totals(provenances: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the lines with these provenances hold and lack, in numbers of episodes and steps."""
    counts: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for provenance in provenances:
        counts.update(
            episodes=1,
            steps=provenance["rows"],
            annotated_steps=provenance["annotated"],
        )
        missing.update(provenance["missing"])
    names = ("episodes", "steps", "annotated_steps")
    return {**{name: counts[name] for name in names}, "missing": dict(sorted(missing.items()))}
