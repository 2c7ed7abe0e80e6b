"""Which lesson a training step belongs to: prompt, losses and what trains.

The paper's curriculum turns spoken reasoning into latent reasoning, a component at a time::

    stage      sequence after the instruction           losses                    trains
    explicit   subtask, boxes and motion as text        tokens + 0.1 visual       backbone
    latent_1   1st component is slots, the rest text    tokens + 0.2 visual       backbone
    latent_2   2nd component too                        tokens + 0.2 visual       backbone
    latent_3   all three are slots                      tokens + 0.2 visual       backbone
    action     all latent                               flow matching             full

A recipe lists stages with SHARES of `train.steps`, so that a short run keeps the proportions.
Switches are hard: every step belongs to exactly one stage, and each stage compiles once.

Source: arXiv 2602.01166, section on progressive training; steps of the authors' launch scripts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PAPER_ORDER = ("explicit", "latent_1", "latent_2", "latent_3", "action")
TRAINS = ("backbone", "full", "action_only")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One lesson.

    Attributes:
      name: what logs call it.
      share: its part of all steps, relative to the other stages' shares.
      reasoning_stage: the prompt; 0 no reasoning, 1 explicit text, 2, 3, 4: the first one, two,
        three components are latent slots.
      token_weight: weight of the cross-entropy over reasoning text.
      visual_weight: weight of the error of the predicted next frame's features.
      action_weight: weight of the flow-matching error.
      trains: "backbone" (vision and text), "action_only" (the action expert) or "full".
      suffix_tokens: room for tokens after the slots; 0 takes `data.suffix_tokens`.
    """

    name: str
    share: float = 1.0
    reasoning_stage: int = 4
    token_weight: float = 0.0
    visual_weight: float = 0.0
    action_weight: float = 0.0
    trains: str = "full"
    suffix_tokens: int = 0

    def __post_init__(self) -> None:
        if self.share <= 0:
            raise ValueError(f"stage {self.name!r}: share must be positive, got {self.share}")
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

    Returns:
      (stage, first step, one past the last) in order; a stage whose share rounds to no step at all
      is left out. Shares 10, 5, 5 over 8 steps give 0..4, 4..6, 6..8.
    """
    total = sum(stage.share for stage in stages)
    result, start, share = [], 0, 0.0
    for stage in stages:
        share += stage.share
        end = round(steps * share / total)
        if end > start:
            result.append((stage, start, end))
        start = end
    return tuple(result)


def paper_stages(
    *,
    explicit: float,
    latent: tuple[float, float, float],
    action: float,
    suffix_tokens: tuple[int, int, int, int, int],
    action_trains: str = "full",
) -> dict[str, dict[str, Any]]:
    """The paper's curriculum as plain values: a recipe's `config.stages`, in `PAPER_ORDER`.

    Args:
      explicit: share of Stage I.
      latent: shares of the three parts of Stage II.
      action: share of Stage III.
      suffix_tokens: room after the slots, per stage: text turns into slots, so it shrinks.
      action_trains: "full" or "action_only".

    Source: arXiv 2602.01166, losses of Stages I to III.
    """
    stages = {
        name: {
            "share": float(share),
            "reasoning_stage": number,
            "token_weight": 1.0,
            "visual_weight": 0.1 if number == 1 else 0.2,
            "action_weight": 0.0,
            "trains": "backbone",
            "suffix_tokens": room,
        }
        for name, share, number, room in zip(
            PAPER_ORDER, (explicit, *latent, action), (1, 2, 3, 4, 4), suffix_tokens, strict=True
        )
    }
    stages["action"] |= {
        "token_weight": 0.0,
        "visual_weight": 0.0,
        "action_weight": 1.0,
        "trains": action_trains,
    }
    return stages
