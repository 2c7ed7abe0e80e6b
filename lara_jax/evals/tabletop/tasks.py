"""What the robot is asked to do: seven families of tasks, of rising need to reason.

    place      put the red block on the yellow plate
    stack      stack the red block on the blue block
    order      put the red block on the purple plate after putting the blue block on ...
    relation   put the block left of the red one on the yellow plate
    ordinal    put the second block from the left on the yellow plate
    negation   put the block that is neither red nor blue on the plate that is not yellow
    two_stage  clear the yellow plate, then put the red block on it (another block lies there)

A family looks at where things lie and proposes a goal, or none where its words would be ambiguous:
then the table is laid anew. So each instruction means one thing in its scene. A goal is the moves
that reach it. Directions are the robot's: left is +y, behind is farther from the robot (+x).

Splits hold out, each, one thing that no training episode has:

    eval_colours    a block's or a plate's colour that training knows on the other kind only
    eval_positions  the block to move lies outside the part of the table that training uses
    eval_phrasings  sentences of other words
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

CLEAR_M = 0.03  # by so much more to the left, say, is clearly left


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things lie, float64[2] in m by colour: the middles of blocks and plates."""

    blocks: Mapping[str, np.ndarray]
    plates: Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Move:
    """One block goes onto a target: names of bodies, as "red_block" and "yellow_plate".

    With `off`, a plate, the move is done as soon as the block is off that plate, wherever it lies.
    """

    block: str
    target: str
    off: str = ""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to become true.

    Attributes:
      moves: all of them shall be done at the end; the expert makes them in this order.
      words: that fill the family's phrasings, by slot.
      in_order: the order of the moves is part of the goal.
      starts_on: blocks that begin the episode in the middle of a plate, names of bodies.
    """

    moves: tuple[Move, ...]
    words: Mapping[str, str]
    in_order: bool = False
    starts_on: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One episode's task: its family, what the robot is told, and what that means."""

    family: str
    instruction: str
    goal: Goal


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of task.

    Attributes:
      propose: a goal in a layout, by random numbers; None where it would be ambiguous.
      phrasings: sentences with the slots of `Goal.words`.
      held_out_phrasings: those of the split "eval_phrasings" alone.
      blocks: how many stand on the table.
    """

    propose: Callable[[Layout, np.random.Generator], Goal | None]
    phrasings: tuple[str, ...]
    held_out_phrasings: tuple[str, ...]
    blocks: int = 3


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which colours blocks and plates have (a family takes the first few), and what is held out."""

    blocks: tuple[str, ...] = ("red", "green", "blue", "orange")
    plates: tuple[str, ...] = ("yellow", "purple")
    held_out_positions: bool = False
    held_out_phrasings: bool = False


def words(name: str) -> str:
    """A body in words: "red_block" -> "red block"."""
    return name.replace("_", " ")


def block_name(colour: str) -> str:
    """Name of a block's body and geom: `"red"` -> `"red_block"`."""
    return f"{colour}_block"


def plate_name(colour: str) -> str:
    """Name of a plate's body and geom: `"yellow"` -> `"yellow_plate"`."""
    return f"{colour}_plate"


def _some(random: np.random.Generator, of: Mapping[str, np.ndarray], count: int) -> list[str]:
    """So many different colours of these, in random order."""
    return [str(colour) for colour in random.choice(list(of), count, replace=False)]


def _one(random: np.random.Generator, of: Mapping[str, np.ndarray]) -> str:
    return str(random.choice(list(of)))


def _put(block: str, plate: str, *, block_words: str = "", plate_words: str = "") -> Goal:
    """A block, by colour, goes onto a plate; in other words than their colours where given."""
    slots = {
        "block": block_words or f"{block} block",
        "target": plate_words or f"{plate} plate",
    }
    move = Move(block=block_name(block), target=plate_name(plate))
    return Goal(moves=(move,), words=slots)


def _place(layout: Layout, random: np.random.Generator) -> Goal:
    block = _one(random, layout.blocks)
    return _put(block, _one(random, layout.plates))


def _stack(layout: Layout, random: np.random.Generator) -> Goal:
    block, below = _some(random, layout.blocks, 2)
    move = Move(block=block_name(block), target=block_name(below))
    return Goal(moves=(move,), words={"block": f"{block} block", "target": f"{below} block"})


def _order(layout: Layout, random: np.random.Generator) -> Goal:
    blocks, plates = _some(random, layout.blocks, 2), _some(random, layout.plates, 2)
    moves = tuple(
        Move(block=block_name(block), target=plate_name(plate))
        for block, plate in zip(blocks, plates, strict=True)
    )
    slots = {
        "first_block": f"{blocks[0]} block",
        "first_target": f"{plates[0]} plate",
        "second_block": f"{blocks[1]} block",
        "second_target": f"{plates[1]} plate",
    }
    return Goal(moves=moves, words=slots, in_order=True)


# Words, axis (0: x, 1: y) and sign of the direction.
_RELATIONS = (("left of", 1, 1), ("right of", 1, -1), ("behind", 0, 1), ("in front of", 0, -1))


def _relation(layout: Layout, random: np.random.Generator) -> Goal | None:
    reference, plate = _one(random, layout.blocks), _one(random, layout.plates)
    relation, axis, sign = _RELATIONS[random.integers(len(_RELATIONS))]
    ahead = {
        colour: sign * (position[axis] - layout.blocks[reference][axis])
        for colour, position in layout.blocks.items()
        if colour != reference
    }
    there = [colour for colour, by in ahead.items() if by > CLEAR_M]
    if len(there) != 1 or any(abs(by) <= CLEAR_M for by in ahead.values()):
        return None
    return _put(there[0], plate, block_words=f"block {relation} the {reference} one")


_RANKS = ("first", "second", "third", "fourth")


def _ordinal(layout: Layout, random: np.random.Generator) -> Goal | None:
    plate, rank = _one(random, layout.plates), int(random.integers(len(layout.blocks)))
    side = ("left", "right")[random.integers(2)]
    row = sorted(layout.blocks, key=lambda colour: -layout.blocks[colour][1])
    across = [layout.blocks[colour][1] for colour in row]
    if (-np.diff(across) <= CLEAR_M).any():
        return None
    block = row[rank if side == "left" else -1 - rank]
    return _put(block, plate, block_words=f"{_RANKS[rank]} block from the {side}")


def _negation(layout: Layout, random: np.random.Generator) -> Goal:
    block, *others = _some(random, layout.blocks, len(layout.blocks))
    plate, other = _some(random, layout.plates, 2)
    which = random.integers(3)  # the block, the plate, or both are said by what they are not
    not_these = f"block that is neither {' nor '.join(others)}"
    return _put(
        block,
        plate,
        block_words=not_these if which != 1 else "",
        plate_words=f"plate that is not {other}" if which != 0 else "",
    )


def _two_stage(layout: Layout, random: np.random.Generator) -> Goal:
    block, distractor = _some(random, layout.blocks, 2)
    plate, other = _some(random, layout.plates, 2)
    away = Move(block=block_name(distractor), target=plate_name(other), off=plate_name(plate))
    return Goal(
        moves=(away, Move(block=block_name(block), target=plate_name(plate))),
        words={"block": f"{block} block", "target": f"{plate} plate"},
        starts_on={block_name(distractor): plate_name(plate)},
    )


_PUT = ("put the {block} on the {target}",)
_PUT_HELD_OUT = ("move the {block} onto the {target}", "the {target} should carry the {block}")

FAMILIES: dict[str, Family] = {
    "place": Family(propose=_place, phrasings=_PUT, held_out_phrasings=_PUT_HELD_OUT),
    "stack": Family(
        propose=_stack,
        phrasings=("stack the {block} on the {target}",),
        held_out_phrasings=(
            "build a tower with the {block} on top of the {target}",
            "set the {block} down on the {target}",
        ),
    ),
    "order": Family(
        propose=_order,
        phrasings=(
            "first put the {first_block} on the {first_target}, "
            "then put the {second_block} on the {second_target}",
            "put the {second_block} on the {second_target} "
            "after putting the {first_block} on the {first_target}",
        ),
        held_out_phrasings=(
            "before putting the {second_block} on the {second_target}, "
            "put the {first_block} on the {first_target}",
            "put the {first_block} on the {first_target} "
            "and only then the {second_block} on the {second_target}",
        ),
    ),
    "relation": Family(propose=_relation, phrasings=_PUT, held_out_phrasings=_PUT_HELD_OUT),
    "ordinal": Family(propose=_ordinal, phrasings=_PUT, held_out_phrasings=_PUT_HELD_OUT, blocks=4),
    "negation": Family(propose=_negation, phrasings=_PUT, held_out_phrasings=_PUT_HELD_OUT),
    "two_stage": Family(
        propose=_two_stage,
        phrasings=(
            "clear the {target}, then put the {block} on it",
            "put the {block} on the {target}, with no other block on it",
        ),
        held_out_phrasings=(
            "let the {block} be the only one on the {target}",
            "swap the block on the {target} for the {block}",
        ),
    ),
}

# The order fixes the seeds of the splits' episodes: append only.
SPLITS: dict[str, Split] = {
    "train": Split(),
    "val": Split(),
    "eval": Split(),
    "eval_colours": Split(blocks=("yellow", "purple", "red", "orange"), plates=("green", "blue")),
    "eval_positions": Split(held_out_positions=True),
    "eval_phrasings": Split(held_out_phrasings=True),
}


def propose_task(
    name: str, layout: Layout, random: np.random.Generator, *, held_out_phrasings: bool
) -> Task | None:
    """A task of a family in a layout, None where the family sees none.

    Args:
      name: of the family, a key of `FAMILIES`.
      layout: where things lie.
      random: chooses the goal and the sentence.
      held_out_phrasings: take a sentence that training never has.
    """
    family = FAMILIES[name]
    goal = family.propose(layout, random)
    if goal is None:
        return None
    phrasings = family.held_out_phrasings if held_out_phrasings else family.phrasings
    sentence = phrasings[random.integers(len(phrasings))]
    return Task(family=name, instruction=sentence.format(**goal.words), goal=goal)
