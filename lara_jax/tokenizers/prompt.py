"""An instruction and its reasoning annotation as the token segments of a batch row.

The reasoning has three components, in a text order of one's choice: SUBTASK, BBOX (boxes of the
objects) and REASON (the motion). The stages of a curriculum turn them, always in this sequence,
from text into latent slots::

    stage   SUBTASK    BBOX       REASON
      0     -          -          -           no reasoning
      1     text       text       text        explicit reasoning
      2     slots      text       text
      3     slots      slots      text
      4     slots      slots      slots       all latent

`PromptBuilder` cuts the row around the K slots, which have no ids. Stage 3, two views (a line
break stands for nothing, \\n for itself)::

    prefix, left-padded    <|im_start|>user\\n
                           <|vision_start|><|image_pad|>*64<|vision_end|>   (once a view)
                           Robot task reasoning: ... Instruction: put the spoon on the towel. @
                            <|start_of_thinking|>
    K slots                filled by the latent loop
    suffix, right-padded   <|end_of_thinking|> Reasoning: Move left. <img_next>*16
                            Action: <robot_action_7><robot_action_30><|im_end|>\\n

Without slots the prefix ends before the explicit reasoning (after " @"), or, where the stage has no
reasoning at all, after the instruction's full stop. Every cut is at a special token or where the
pre-tokenisation cuts anyway, so prefix + slots + suffix are exactly the ids of the whole string.

The text differs from the reference's where an annotation is missing: the reference then drops that
component's slots, so that K varies inside a batch and differs between training and deployment, and
writes a box of the whole image as if somebody had seen one. Here the slots of a stage are always
all there (K is a constant of the stage), and an explicit component without annotation is left out.
Also, an empty instruction keeps its full stop and " @".

Source: LaRA-VLA (arXiv 2602.01166) and the text format of its PyTorch release.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lara_jax.tokenizers.qwen import Tokenizer

# The reference's wording, spelling included: released checkpoints have seen exactly these tokens.
BASE_PROMPT = (
    "Robot task reasoning: first output the Subtask to preform next, then output the BBox of "
    "target object, then generate the Motion Reasoning. Instruction:"
)
COMPONENTS = ("SUBTASK", "BBOX", "REASON")
LATENT_FROM_STAGE = {"SUBTASK": 2, "BBOX": 3, "REASON": 4}
MAX_STAGE = 4
MAX_SLOTS = 32
BOX_DECIMALS = 4

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotation:
    """The reasoning of one step; an empty field is a missing annotation.

    Attributes:
      subtask: what the robot does now, such as "move to the red block".
      boxes: normalised (x1, y1, x2, y2) of the object to handle and, if known, of the destination.
      motion: where the gripper goes, such as "Move forward and left, then down."
    """

    subtask: str = ""
    boxes: tuple[Box, ...] = ()
    motion: str = ""

    def __post_init__(self) -> None:
        for box in self.boxes:
            if len(box) != 4 or not all(map(math.isfinite, box)):
                raise ValueError(f"a box is 4 finite numbers x1 y1 x2 y2; got {tuple(box)}")

    def explicit(self, component: str, *, box_decimals: int = BOX_DECIMALS) -> str:
        """The component as text, "" where it is missing.

        >>> Annotation(boxes=((0.1, 0.2, 0.3, 0.9),)).explicit("BBOX")
        'BBox: [0.1000 0.2000 0.3000 0.9000].'
        """
        if component == "SUBTASK":
            return f"Subtask: {self.subtask}." if self.subtask else ""
        if component == "REASON":
            return f"Reasoning: {self.motion}" if self.motion else ""
        boxes = (" ".join(f"{float(x):.{box_decimals}f}" for x in box) for box in self.boxes)
        return "BBox: " + " ".join(f"[{box}]" for box in boxes) + "." if self.boxes else ""


def split_slots(total: int, order: Sequence[str] = COMPONENTS) -> dict[str, int]:
    """Shares K slots evenly over the components, the remainder to the earliest.

    >>> split_slots(4, ("BBOX", "SUBTASK", "REASON"))
    {'BBOX': 2, 'SUBTASK': 1, 'REASON': 1}
    """
    _check_order(order)
    if not 0 <= total <= MAX_SLOTS:
        raise ValueError(f"latent slots: {total}; allowed 0..{MAX_SLOTS}")
    share, rest = divmod(total, len(order))
    return {component: share + (rank < rest) for rank, component in enumerate(order)}


@dataclass(frozen=True, kw_only=True)
class PromptBuilder:
    """Makes the token segments of a row; one builder for each stage of the curriculum.

    Attributes:
      tokenizer: the tokenizer.
      prefix_tokens: P, length of the left-padded prefix.
      suffix_tokens: S, length of the right-padded suffix.
      views: number of camera views.
      tokens_per_view: image tokens of a view (64 at 256 x 256 px).
      reasoning_stage: 0..4, see the table at the top of this file.
      component_order: order of the components in the text; one that is not listed never appears.
      slots_per_component: latent slots of each listed component; one with 0 vanishes when it turns
        latent.
      img_next_tokens: number of `<img_next>` tokens.
      base_prompt: words before the instruction.
      box_decimals: of the numbers in explicit boxes.
      spoken_stage: in rows that are `spoken`, what this stage has latent beyond that one is written
        as well, after the slots; 0 for the stage before, `reasoning_stage` - 1.
    """

    tokenizer: Tokenizer
    prefix_tokens: int
    suffix_tokens: int
    views: int
    tokens_per_view: int
    reasoning_stage: int
    component_order: tuple[str, ...] = COMPONENTS
    slots_per_component: Mapping[str, int] = field(
        default_factory=lambda: dict.fromkeys(COMPONENTS, 1)
    )
    img_next_tokens: int = 16
    base_prompt: str = BASE_PROMPT
    box_decimals: int = BOX_DECIMALS
    spoken_stage: int = 0

    def __post_init__(self) -> None:
        _check_stage(self.reasoning_stage)
        if not 0 <= self.spoken_stage <= self.reasoning_stage:
            raise ValueError(
                f"spoken_stage is {self.spoken_stage}; allowed 0..{self.reasoning_stage}"
            )
        _check_order(self.component_order)
        counts = dict(self.slots_per_component)
        if set(counts) != set(self.component_order):
            raise ValueError(
                f"slots_per_component names {sorted(counts)}; "
                f"expected {sorted(self.component_order)}"
            )
        if min(counts.values()) < 0 or sum(counts.values()) > MAX_SLOTS:
            raise ValueError(
                f"slots_per_component {counts}; each at least 0, together at most {MAX_SLOTS}"
            )
        for name in ("prefix_tokens", "suffix_tokens", "views", "tokens_per_view"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed 1 and more")
        if self.img_next_tokens < 0:
            raise ValueError(f"img_next_tokens is {self.img_next_tokens}; allowed 0 and more")

    @cached_property
    def latent_slots(self) -> int:
        """K: slots of the components that are latent in this stage, annotated or not."""
        return sum(self.slots_per_component[name] for name in self._components(latent=True))

    def __call__(
        self,
        instruction: str,
        annotation: Annotation | None = None,
        action_ids: Sequence[int] | np.ndarray = (),
        *,
        spoken: bool = False,
    ) -> dict[str, np.ndarray]:
        """The padded segments, by the names of `lara_jax.batch.Batch`.

        Args:
          instruction: the task in words.
          annotation: the step's reasoning; None where there is none, and when acting.
          action_ids: discrete action tokens (of `Tokenizer.action_ids`), put after " Action: ".
          spoken: also write what is newly latent, see `spoken_stage`.

        Returns:
          prefix_ids int32[P], prefix_mask bool[P] (True at real tokens), suffix_ids int32[S],
          suffix_mask bool[S], loss_mask bool[S] (True at suffix tokens other than `<img_next>`).

        Raises:
          ValueError: a segment is longer than P or S; nothing is ever cut off.
        """
        prefix, suffix = self.segments(instruction, annotation, action_ids, spoken=spoken)
        lengths = (("prefix", prefix, self.prefix_tokens), ("suffix", suffix, self.suffix_tokens))
        for name, ids, allowed in lengths:
            if len(ids) > allowed:
                raise ValueError(
                    f"{name} of instruction {instruction!r} has {len(ids)} tokens; "
                    f"{name}_tokens allows {allowed}"
                )
        start = self.prefix_tokens - len(prefix)
        prefix_ids = np.full(self.prefix_tokens, self.tokenizer.pad_id, np.int32)
        prefix_ids[start:] = prefix
        suffix_ids = np.full(self.suffix_tokens, self.tokenizer.pad_id, np.int32)
        suffix_ids[: len(suffix)] = suffix
        suffix_mask = np.arange(self.suffix_tokens) < len(suffix)
        return {
            "prefix_ids": prefix_ids,
            "prefix_mask": np.arange(self.prefix_tokens) >= start,
            "suffix_ids": suffix_ids,
            "suffix_mask": suffix_mask,
            "loss_mask": suffix_mask & (suffix_ids != self.tokenizer.img_next_id),
        }

    def segments(
        self,
        instruction: str,
        annotation: Annotation | None = None,
        action_ids: Sequence[int] | np.ndarray = (),
        *,
        spoken: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Ids of prefix and suffix without padding: how long P and S must be. Called as above."""
        tokenizer, annotation = self.tokenizer, annotation or Annotation()
        explicit = self._components(latent=False)
        text = f" {instruction.strip()}."
        if explicit or self.latent_slots:
            text += " @"
        prefix, suffix = list(self._opening), []
        if self.latent_slots:
            prefix += [*tokenizer.encode_text(text + " "), tokenizer.start_of_thinking_id]
            suffix += [tokenizer.end_of_thinking_id]
        else:
            prefix += tokenizer.encode_text(text)
        written = self._components(latent=False, spoken=spoken)
        parts = [annotation.explicit(part, box_decimals=self.box_decimals) for part in written]
        text = "".join(f" {part}" for part in parts if part)
        if self.img_next_tokens:
            suffix += tokenizer.encode_text(text + " ")
            suffix += [tokenizer.img_next_id] * self.img_next_tokens
            text = ""
        if len(action_ids):
            suffix += [*tokenizer.encode_text(text + " Action: "), *map(int, action_ids)]
        else:
            suffix += tokenizer.encode_text(text)
        return prefix, suffix + self._closing

    @cached_property
    def _opening(self) -> list[int]:
        """The part of the prefix that is the same in every row: chat, views, base prompt."""
        tokenizer = self.tokenizer
        pads = [tokenizer.image_pad_id] * self.tokens_per_view
        view = [tokenizer.vision_start_id, *pads, tokenizer.vision_end_id]
        chat = [tokenizer.im_start_id, *tokenizer.encode_text("user\n")]
        return chat + view * self.views + tokenizer.encode_text(self.base_prompt)

    @cached_property
    def _closing(self) -> list[int]:
        return [self.tokenizer.im_end_id, *self.tokenizer.encode_text("\n")]

    def _components(self, *, latent: bool, spoken: bool = False) -> list[str]:
        """The components that are latent (or else explicit) in this stage, in text order; with
        `spoken`, those that are newly latent count as explicit."""
        if self.reasoning_stage == 0:
            return []
        last = self.reasoning_stage
        if spoken:
            last = self.spoken_stage or last - 1
        return [
            name for name in self.component_order if (LATENT_FROM_STAGE[name] <= last) == latent
        ]


def _check_stage(stage: int) -> None:
    if stage not in range(MAX_STAGE + 1):
        raise ValueError(f"reasoning_stage is {stage}; allowed 0..{MAX_STAGE}")


def _check_order(order: Sequence[str]) -> None:
    if not order or len(set(order)) < len(order) or not set(order) <= set(COMPONENTS):
        raise ValueError(
            f"component_order is {tuple(order)}; allowed: some of {COMPONENTS}, each at most once"
        )
