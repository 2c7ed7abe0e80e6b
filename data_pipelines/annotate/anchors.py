"""Anchors of an episode: when the gripper does what, and which objects the instruction names.

The gripper's state cuts an episode into phases; nothing is guessed::

    gripper   1 1 1 1 1 1 0 0 0 0 0 0 0 0 0 1 1 1 1 1        1 open, 0 closed
    phase     approach    grasp move        release retreat
    cycle     0 . . . . . . . . . . . . . . . . . . . .

`grasp` and `release` last while the arm stands still after the gripper's command, at least one step
and at most HANDLING_SECONDS. After a release comes the next cycle's `approach`, or the `retreat`.
An episode that starts with a closed gripper approaches if it grasps something later, else it moves
what it holds. One whose gripper does nothing is a single `move`.

The instruction is read by a small grammar, clause by clause::

    "pick up the bowl on the stove and place it in the drawer"
    -> Goal(verb="place", object="bowl", relation="in", destination="drawer")

Source: LaRA-VLA (arXiv 2602.01166), annotation "anchor first, generate later": segments from the
changes of the gripper's state.
"""

import itertools
import re
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

# The gripper closes or opens when its signal (0 closed, 1 open) passes these; between them it stays
# what it was.
CLOSE_BELOW, OPEN_ABOVE = 0.4, 0.6
# An opening or closing that is undone sooner is a flicker.
LEAST_SECONDS = 0.4
# The most that a grasp or a release lasts.
HANDLING_SECONDS = 1.0
# The arm stands still below this speed.
STILL_M_PER_SECOND = 0.05


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Rows [start, stop) of an episode in one phase; `cycle` counts what was grasped before."""

    phase: str
    start: int
    stop: int
    cycle: int = 0


def segment_episode(
    gripper: np.ndarray, positions: np.ndarray | None, control_hz: float
) -> tuple[Segment, ...]:
    """Cuts an episode into phases.

    Args:
      gripper: float[N], absolute command, 1 open and 0 closed.
      positions: float[N, 3], m, of the gripper; None where they are not known: a grasp and a
        release then last for HANDLING_SECONDS.
      control_hz: steps a second.

    Returns:
      Segments in order that cover the rows. A single "move" if the gripper does nothing.
    """
    runs = _runs(gripper, max(1, round(LEAST_SECONDS * control_hz)))
    if len(runs) < 2:
        return (Segment(phase="move", start=0, stop=len(gripper)),)
    last_closed = max(number for number, (closed, _, _) in enumerate(runs) if closed)
    segments: list[Segment] = []
    cycle = 0
    for number, (closed, start, stop) in enumerate(runs):
        handled = _handled(positions, start, stop, control_hz)
        if closed and number:
            parts = [("grasp", start, handled), ("move", handled, stop)]
        elif closed:
            parts = [("approach" if last_closed else "move", start, stop)]
        else:
            held = bool(segments) and segments[-1].phase in ("grasp", "move")
            rest = "approach" if number < last_closed else "retreat"
            parts = [("release", start, handled)] if held else []
            parts.append((rest, handled if held else start, stop))
        for phase, begin, end in parts:
            cycle += phase == "approach" and bool(segments) and segments[-1].phase == "release"
            if end > begin:
                segments.append(Segment(phase=phase, start=begin, stop=end, cycle=cycle))
    return tuple(_joined(segments))


def is_closed(gripper: np.ndarray) -> np.ndarray:
    """bool[N], whether the gripper is closed, with hysteresis.

    Args:
      gripper: float[N], 1 open and 0 closed.
    """
    decided = (gripper < CLOSE_BELOW) | (gripper > OPEN_ABOVE)
    # Each step takes its state from the last decided one; before the first, from the nearer end.
    last = np.maximum.accumulate(np.where(decided, np.arange(len(gripper)), 0))
    return gripper[last] < 0.5


def _runs(gripper: np.ndarray, least: int) -> list[tuple[bool, int, int]]:
    """(closed, start, stop) of the stretches in one state, flickers taken out.

    The last stretch is kept however short it is: many episodes end as soon as they let go.
    """
    closed = is_closed(gripper)
    edges = [0, *(np.flatnonzero(np.diff(closed)) + 1).tolist(), len(closed)]
    runs: list[tuple[bool, int, int]] = []
    begin = 0
    for start, stop in itertools.pairwise(edges):
        flicker = stop - start < least and stop < len(closed)
        if flicker or (runs and runs[-1][0] == closed[start]):
            if runs:
                runs[-1] = (runs[-1][0], runs[-1][1], stop)
                begin = stop
            continue
        runs.append((bool(closed[start]), begin, stop))
        begin = stop
    return runs


def _handled(positions: np.ndarray | None, start: int, stop: int, hz: float) -> int:
    """Where the arm moves on after a change of the gripper at `start`."""
    limit = min(stop, start + max(1, round(HANDLING_SECONDS * hz)))
    if positions is None:
        return limit
    speed = np.linalg.norm(np.diff(positions[start + 1 : limit + 1], axis=0), axis=-1) * hz
    moving = np.flatnonzero(speed > STILL_M_PER_SECOND)
    return start + 1 + int(moving[0]) if len(moving) else limit


def _joined(segments: list[Segment]) -> list[Segment]:
    """Neighbours of the same phase and cycle as one."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and (joined[-1].phase, joined[-1].cycle) == (segment.phase, segment.cycle):
            start = joined.pop().start
            segment = Segment(
                phase=segment.phase, start=start, stop=segment.stop, cycle=segment.cycle
            )
        joined.append(segment)
    return joined


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What one part of an instruction asks for.

    Attributes:
      verb: as "put" or "turn on"; empty if the grammar knows none: then `object` is all the rest.
      object: the noun phrase without its article, as "red block".
      relation: how the object shall lie to the destination, as "next to".
      destination: likewise a noun phrase; empty where there is none.
    """

    verb: str = ""
    object: str = ""
    relation: str = ""
    destination: str = ""


_TRANSFER_VERBS = (
    "put", "place", "move", "set", "bring", "take", "drop", "transfer", "insert", "stack", "slide",
    "push", "pull", "pour", "carry", "transport", "lay", "position", "relocate", "throw", "hang",
    "return", "drag", "shift", "tuck", "pack", "load", "store", "leave", "unstack", "sweep",
    "scoop",
)  # fmt: skip
GRASP_VERBS = (
    "pick up", "pick", "grasp", "grab", "lift up", "lift", "hold", "get", "raise", "retrieve",
    "remove", "unplug",
)  # fmt: skip
_OTHER_VERBS = (
    "open", "close", "shut", "turn on", "turn off", "switch on", "switch off", "turn", "rotate",
    "twist", "flip", "press", "fold", "unfold", "wipe", "clean", "cover", "uncover",
    "reach", "touch", "poke", "knock over", "knock", "topple", "plug", "stir",
)  # fmt: skip
_PLACES = (
    "on top of", "on the top of", "on to", "onto", "on", "inside of", "inside", "into", "in",
    "to the left side of", "to the right side of", "to the left of", "to the right of",
    "on the left side of", "on the right side of", "on the left of", "on the right of",
    "in front of", "in between", "in the middle of", "next to", "close to", "near to", "near",
    "beside", "behind", "underneath", "under", "below", "beneath", "above", "over", "between",
    "against", "at", "around", "towards", "toward", "to",
)  # fmt: skip
_SOURCES = ("from", "out of", "off of", "off", "away from")
_PRONOUNS = ("it", "them", "that", "this", "one")
_DETERMINERS = r"(?:(?:the|a|an|some|both|all|your|its|this|that|these|those|of)\s+)+"
_ADVERBS = r"\s+(?:upright|down|up|away|again|back|slowly|carefully|gently|forward|backward)$"


def _any_of(*phrases: str) -> str:
    """A pattern for any of these, the longest first."""
    return "|".join(sorted(phrases, key=len, reverse=True))


_VERB = re.compile(rf"(?:{_any_of(*_TRANSFER_VERBS, *GRASP_VERBS, *_OTHER_VERBS)})\b")
_POLITE = re.compile(r"^(?:please|now|then|robot|can you|could you|you should)[, ]+")
_NEXT_CLAUSE = re.compile(
    rf"\s*(?:[,;.]|\band\b|\bthen\b)[\s,]*(?:then\s+|and\s+)*(?={_VERB.pattern})"
)
_PLACE = re.compile(rf"\b(?:{_any_of(*_PLACES, *_SOURCES)})\b")
_RELATIVE = re.compile(r"\s+(?:which|that|who)\s.*$")


@lru_cache(maxsize=4096)
def parse_instruction(instruction: str) -> tuple[Goal, ...]:
    """The goals of an instruction, in order.

    "put A on B", "pick up A", "take A out of C and put it into B", "open A" and the like; clauses
    are joined by "and", "then", a comma or a full stop before a verb. A clause whose object is "it"
    or missing goes on about the object before. Where no verb is known, the object is the whole
    clause.

    Returns:
      Goals; none for an empty instruction.
    """
    text = re.sub(r"\s+", " ", re.sub(r"[^\w\s,;.'-]", " ", instruction.lower())).strip(" .,;")
    text = _POLITE.sub("", text)
    goals: list[Goal] = []
    for clause in filter(None, _NEXT_CLAUSE.split(text)):
        goal = _parse_clause(clause.strip(" .,;"))
        before = goals[-1].object if goals else ""
        if goal.destination in _PRONOUNS:
            goal = replace(goal, destination=before)
        elif goal.verb and (not goal.object or goal.object in _PRONOUNS):
            goal = replace(goal, object=before)
            # "pick up A and put it on B" is one goal; "open A and close it" is two.
            if goals and goals[-1].verb in (*GRASP_VERBS, "take", "unstack"):
                goals.pop()
        goals.append(goal)
    return tuple(goals)


def _parse_clause(clause: str) -> Goal:
    verb = _VERB.match(clause)
    if not verb:
        return Goal(object=_noun_phrase(clause))
    rest = re.sub(r"^(?:up|down)\s+", "", clause[verb.end() :].strip())
    place = _PLACE.search(rest)
    goal = Goal(verb=verb.group(), object=_noun_phrase(rest[: place.start()] if place else rest))
    while place and place.group() in _SOURCES:
        place = _PLACE.search(rest, place.end())
    if goal.verb not in _TRANSFER_VERBS or not place:
        return goal
    destination = rest[place.end() :]
    source = re.search(rf"\b(?:{_any_of(*_SOURCES)})\b", destination)
    return Goal(
        verb=goal.verb,
        object=goal.object,
        relation=place.group(),
        destination=_noun_phrase(destination[: source.start()] if source else destination),
    )


def _noun_phrase(text: str) -> str:
    """Without determiners, adverbs and relative clauses: "the red block" -> "red block"."""
    text = _RELATIVE.sub("", f" {text.strip(' .,;')}").strip()
    text = re.sub(_ADVERBS, "", f" {text}").strip()
    return re.sub(rf"^{_DETERMINERS}", "", text + " ").strip()
