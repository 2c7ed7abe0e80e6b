"""Which lesson a training step belongs to: prompt, losses and what trains.

The paper's curriculum turns spoken reasoning into latent reasoning, a component at a time::

    stage      sequence after the instruction           losses                        trains
    pretrain   discrete actions, no reasoning           tokens + 0.1 visual + flow    full
    explicit   subtask, boxes, motion; actions          tokens + 0.1 visual           backbone
    latent_1   1st component is slots, the rest text    tokens + 0.2 visual           backbone
    latent_2   2nd component too                        tokens + 0.2 visual           backbone
    latent_3   all three are slots; actions             tokens + 0.2 visual           backbone
    action     all latent                               flow matching                 full

Pretraining is for data without annotations, such as Open X-Embodiment; the rest is the paper's. Up
to latent_3 the action chunk stands at the end of the sequence, too, as discrete tokens (FAST); the
action expert never sees them.

A recipe gives each stage a number of steps or of examples, or a SHARE of the steps that are left,
so that a short run keeps the proportions. Every step belongs to exactly one stage, and each stage
compiles once. Switches are hard, unless a stage ANNEALS: then what is newly latent is at first also
spoken, after its slots, and the share of rows in which it is silent grows from 0 to 1::

    share of silent rows   1 |      .-------
                             |   .-'
                           0 |.-'___________   steps of the stage
                              <- anneal ->

Source: arXiv 2602.01166, section on progressive training; steps of the authors' launch scripts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

PAPER_ORDER = ("explicit", "latent_1", "latent_2", "latent_3", "action")
TRAINS = ("backbone", "full", "action_only")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One lesson.

    Attributes:
      name: what logs call it.
      share: its part of the steps that stages with a length of their own leave, relative to the
        other shares.
      steps, examples: its length, in optimizer steps or in samples; 0 for a share.
      reasoning_stage: the prompt; 0 no reasoning, 1 explicit text, 2, 3, 4: the first one, two,
        three components are latent slots.
      anneal: part of its steps, 0 to 1, over which the newly latent component falls silent.
      discrete_actions: whether the sequence ends with the action chunk as tokens.
      datasets: those of the run's mixture that it trains on, by name; () for all.
      token_weight: weight of the cross-entropy over reasoning text and discrete actions.
      visual_weight: weight of the error of the predicted next frame's features.
      action_weight: weight of the flow-matching error.
      trains: "backbone" (vision and text), "action_only" (the action expert) or "full".
      suffix_tokens: room for tokens after the slots; 0 takes `data.suffix_tokens`.
    """

    name: str
    share: float = 1.0
    steps: int = 0
    examples: int = 0
    reasoning_stage: int = 4
    anneal: float = 0.0
    discrete_actions: bool = False
    datasets: tuple[str, ...] = ()
    token_weight: float = 0.0
    visual_weight: float = 0.0
    action_weight: float = 0.0
    trains: str = "full"
    suffix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.share <= 0:
            raise ValueError(f"stage {self.name!r}: share must be positive, got {self.share}")
        if min(self.steps, self.examples) < 0 or (self.steps and self.examples):
            raise ValueError(
                f"stage {self.name!r}: give steps or examples, not negative, not both; got "
                f"steps {self.steps}, examples {self.examples}"
            )
        if not 0 <= self.anneal <= 1 or (self.anneal and self.reasoning_stage < 2):
            raise ValueError(
                f"stage {self.name!r}: anneal is 0 to 1, and only where something is newly latent "
                f"(reasoning_stage 2 to 4); got {self.anneal}"
            )
        if self.discrete_actions and not self.token_weight:
            raise ValueError(
                f"stage {self.name!r}: discrete_actions without a token_weight teach nothing"
            )
        if self.reasoning_stage not in range(5):
            raise ValueError(
                f"stage {self.name!r}: reasoning_stage must be 0 to 4, got {self.reasoning_stage}"
            )
        if self.trains not in TRAINS:
            raise ValueError(
                f"stage {self.name!r}: trains must be one of {TRAINS}, got {self.trains!r}"
            )
        weights = (self.token_weight, self.visual_weight, self.action_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"stage {self.name!r}: loss weights (token, visual, action) must be >= 0 and one "
                f"of them positive, got {weights}"
            )
        if self.trains == "backbone" and self.action_weight:
            raise ValueError(
                f"stage {self.name!r}: action_weight {self.action_weight} with trains='backbone' "
                "would train nothing by it; use trains='full'"
            )
        if self.trains == "action_only" and not self.action_weight:
            raise ValueError(f"stage {self.name!r}: trains='action_only' needs an action_weight")
        if self.trains == "action_only" and (self.token_weight or self.visual_weight):
            raise ValueError(
                f"stage {self.name!r}: token_weight {self.token_weight} and visual_weight "
                f"{self.visual_weight} with trains='action_only' would train nothing"
            )
        if self.suffix_tokens < 0:
            raise ValueError(f"stage {self.name!r}: suffix_tokens {self.suffix_tokens} is negative")


def spans(stages: Sequence[Stage], steps: int) -> tuple[tuple[Stage, int, int], ...]:
    """Divides the steps 0..steps-1 among the stages.

    Args:
      stages: in order, without `examples` (`in_steps`).
      steps: of the run.

    Returns:
      (stage, first step, one past the last) in order; a stage whose share rounds to no step at all
      is left out. Shares 10, 5, 5 over 8 steps give 0..4, 4..6, 6..8.

    Raises:
      ValueError: the stages' own lengths are more than the run's steps, or less with no share.
    """
    fixed = sum(stage.steps for stage in stages)
    total = sum(stage.share for stage in stages if not stage.steps)
    if fixed > steps or (fixed < steps and not total):
        raise ValueError(
            f"the stages take {fixed} steps, but train.steps is {steps}; make them equal, or give "
            f"a stage a share of the rest"
        )
    result, start, taken, share = [], 0, 0, 0.0
    for stage in stages:
        taken += stage.steps
        share += 0.0 if stage.steps else stage.share
        end = taken + (round((steps - fixed) * share / total) if total else 0)
        if end > start:
            result.append((stage, start, end))
        start = end
    return tuple(result)


def stage_of(stages: Sequence[Stage], steps: int, step: int) -> Stage:
    """The stage that a run's step belongs to.

    Args:
      stages, steps: as of `spans`.
      step: from 1 on; 0 is the first one's.
    """
    return next(stage for stage, _, end in spans(stages, steps) if step <= end)


def in_steps(stages: Sequence[Stage], batch_size: int) -> tuple[Stage, ...]:
    """The stages with their examples turned into steps, rounded up."""
    return tuple(
        replace(stage, steps=-(-stage.examples // batch_size), examples=0)
        if stage.examples
        else stage
        for stage in stages
    )


def silent_share(stage: Stage, start: int, end: int, step: int) -> float:
    """The share of rows of a step in which what is newly latent is not also spoken.

    Args:
      stage: whose steps are `start` to `end` - 1.
      start, end: of the stage in the run.
      step: of the run.

    Returns:
      0 to 1; always 1 in a stage that does not anneal.
    """
    if not stage.anneal:
        return 1.0
    return min(1.0, (step - start) / max(1.0, stage.anneal * (end - start)))


def paper_stages(
    *,
    explicit: float,
    latent: tuple[float, float, float],
    action: float,
    suffix_tokens: tuple[int, int, int, int, int],
    action_trains: str = "full",
    discrete_actions: bool = True,
    anneal: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """The paper's curriculum as plain values: a recipe's `config.stages`, in `PAPER_ORDER`.

    Args:
      explicit: share of Stage I.
      latent: shares of the three parts of Stage II.
      action: share of Stage III.
      suffix_tokens: room after the slots, per stage: text turns into slots, so it shrinks.
      action_trains: "full" or "action_only".
      discrete_actions: action tokens in Stages I and II, as in the paper.
      anneal: of the parts of Stage II; 0 for the paper's hard switches. Each then has the room of
        the stage before it, as rows that are still spoken need it.

    Source: arXiv 2602.01166, losses of Stages I to III.
    """
    explicit_room, *latent_rooms, action_room = suffix_tokens
    if anneal:
        latent_rooms = [explicit_room, *latent_rooms[:-1]]
    rooms = (explicit_room, *latent_rooms, action_room)
    stages = {
        name: {
            "share": float(share),
            "reasoning_stage": number,
            "anneal": anneal if number >= 2 else 0.0,
            "discrete_actions": discrete_actions,
            "token_weight": 1.0,
            "visual_weight": 0.1 if number == 1 else 0.2,
            "action_weight": 0.0,
            "trains": "backbone",
            "suffix_tokens": room,
        }
        for name, share, number, room in zip(
            PAPER_ORDER, (explicit, *latent, action), (1, 2, 3, 4, 4), rooms, strict=True
        )
    }
    stages["action"] |= {
        "token_weight": 0.0,
        "visual_weight": 0.0,
        "action_weight": 1.0,
        "trains": action_trains,
        "anneal": 0.0,
        "discrete_actions": False,
    }
    return stages


def pretrain_stage(*, suffix_tokens: int) -> dict[str, Any]:
    """Basic VLA pretraining as plain values: actions both ways and visual thoughts, no reasoning.

    Args:
      suffix_tokens: room for the discrete actions; C * A tokens always suffice.

    Source: the article's first stage; visual weight as in Stage I.
    """
    return {
        "reasoning_stage": 0,
        "discrete_actions": True,
        "token_weight": 1.0,
        "visual_weight": 0.1,
        "action_weight": 1.0,
        "trains": "full",
        "suffix_tokens": suffix_tokens,
    }
