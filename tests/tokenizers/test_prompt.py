"""Reasoning text as the reference writes it, and the builder's segments, pads, masks and errors."""

import json
import pickle
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lara_jax.tokenizers.prompt import (
    BASE_PROMPT,
    COMPONENTS,
    MAX_SLOTS,
    Annotation,
    PromptBuilder,
    split_slots,
)
from lara_jax.tokenizers.qwen import Tokenizer, load_tokenizer
from tests.tokenizers.reference_text import reasoning_text

INSTRUCTION = "put the spoon on the towel"
ANNOTATION = Annotation(
    subtask="move to the spoon",
    boxes=((0.1, 0.2, 0.34567, 0.9), (0.5, 0.5, 0.75, 1.0)),
    motion="Move forward and left, then down.",
)
STAGES = range(5)
ORDERS = [("SUBTASK", "BBOX", "REASON"), ("BBOX", "SUBTASK", "REASON")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def qwen_tokenizer(shared_dir: Path) -> Tokenizer:
    return load_tokenizer(shared_dir / "data" / "qwen3_tokenizer" / "tokenizer.json")


def builder(tokenizer: Tokenizer, **settings: Any) -> PromptBuilder:
    defaults = {
        "prefix_tokens": 128,
        "suffix_tokens": 160,
        "views": 2,
        "tokens_per_view": 4,
        "reasoning_stage": 4,
    }
    return PromptBuilder(tokenizer=tokenizer, **(defaults | settings))


def whole_text(make: PromptBuilder, reasoning: str, action: str = "") -> str:
    """The reference's chat string: its prompt around the formatter's text."""
    view = f"<|vision_start|>{'<|image_pad|>' * make.tokens_per_view}<|vision_end|>"
    actions = f" Action: {action}" if action else ""
    prompt = f"{view * make.views}{BASE_PROMPT} {reasoning}{actions}"
    return f"<|im_start|>user\n{prompt}<|im_end|>\n"


def test_reasoning_text_equals_the_reference(shared_dir: Path) -> None:
    cases = json.loads((shared_dir / "golden" / "cot_text.json").read_text())
    assert len(cases) == 120
    for case in cases:
        sample = case["sample"]
        boxes = [sample[k] for k in ("bbox", "bbox2") if sample.get(f"{k}_valid")]
        annotation = Annotation(
            sample["cot_subtask"], tuple(map(tuple, boxes)), sample["cot_reasoning"]
        )
        text = reasoning_text(
            case["instruction"],
            annotation,
            reasoning_stage=case["stage"],
            component_order=case["order"],
            slots_per_component=case["tag2think_count"],
        )
        assert text == case["text"], case


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1, 3)])
@pytest.mark.parametrize("with_action", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["tokenizer", "qwen_tokenizer"])
def test_segments_are_the_reference_string_cut_in_three(
    request: pytest.FixtureRequest,
    name: str,
    stage: int,
    with_action: bool,
    counts: tuple[int, ...],
    order: tuple[str, ...],
) -> None:
    tokenizer = request.getfixturevalue(name)
    slots = dict(zip(COMPONENTS, counts, strict=True))
    make = builder(
        tokenizer, reasoning_stage=stage, component_order=order, slots_per_component=slots
    )
    assert make.latent_slots == [0, 0, counts[0], sum(counts[:2]), sum(counts)][stage]
    actions = [3, 250, 3] if with_action else []
    prefix, suffix = make.segments(INSTRUCTION, ANNOTATION, tokenizer.action_ids[actions])
    reasoning = reasoning_text(
        INSTRUCTION,
        ANNOTATION,
        reasoning_stage=stage,
        component_order=order,
        slots_per_component=slots,
    )
    whole = whole_text(make, reasoning, "".join(f"<robot_action_{i}>" for i in actions))
    ids = [*prefix, *[tokenizer.thinking_id] * make.latent_slots, *suffix]
    assert ids == tokenizer.encode(whole)


@pytest.mark.parametrize(
    "instruction", ["", "  Pick it up.  ", '"Stack", then 2 x left!', "把它放好"]
)
@pytest.mark.parametrize("motion", ["ends in blanks  ", "ends in a line\n", "5 cm"])
@pytest.mark.parametrize("stage", [1, 2, 4])
def test_cuts_are_exact_for_odd_text(
    tokenizer: Tokenizer, stage: int, motion: str, instruction: str
) -> None:
    """Cutting and then encoding gives the ids of the whole string, whatever stands at the cuts."""
    make = builder(tokenizer, reasoning_stage=stage)
    annotation = Annotation("turn around ", ANNOTATION.boxes, motion)
    prefix, suffix = make.segments(instruction, annotation)
    thoughts = [tokenizer.thinking_id] * make.latent_slots
    ids = [*prefix, *thoughts, *suffix]
    assert ids == tokenizer.encode(tokenizer.decode(ids))


S, B, R = "Subtask: s. ", "BBox: [0.0000 0.5000 1.0000 1.0000]. ", "Reasoning: m "
START, END = "<|start_of_thinking|>", "<|end_of_thinking|>"


@pytest.mark.parametrize(
    ("stage", "counts", "prefix", "suffix"),
    [
        (0, (1, 1, 1), "go.", " "),
        (1, (1, 1, 1), "go. @", f" {S}{B}{R}"),
        (2, (1, 1, 1), f"go. @ {START}", f"{END} {B}{R}"),
        (3, (1, 1, 1), f"go. @ {START}", f"{END} {R}"),
        (4, (0, 0, 1), f"go. @ {START}", f"{END} "),
        (2, (0, 1, 1), "go. @", f" {B}{R}"),
        (3, (0, 0, 1), "go. @", f" {R}"),
        (4, (0, 0, 0), "go.", " "),
    ],
)
def test_text_of_stages_and_counts(
    tokenizer: Tokenizer, stage: int, counts: tuple[int, ...], prefix: str, suffix: str
) -> None:
    slots = dict(zip(COMPONENTS, counts, strict=True))
    make = builder(tokenizer, reasoning_stage=stage, slots_per_component=slots)
    ids = make.segments("go", Annotation("s", ((0, 0.5, 1, 1),), "m"))
    texts = [tokenizer.decode(segment) for segment in ids]
    assert texts[0].endswith(f"Instruction: {prefix}")
    assert texts[1] == suffix + "<img_next>" * 16 + "<|im_end|>\n"


@pytest.mark.parametrize(
    ("stage", "spoken_stage", "suffix"),
    [
        (2, 0, f"{END} Subtask: s. {B}{R}"),
        (3, 0, f"{END} {B}{R}"),
        (4, 0, f"{END} {R}"),
        (4, 1, f"{END} Subtask: s. {B}{R}"),
        (4, 2, f"{END} {B}{R}"),
    ],
)
def test_spoken_rows_keep_their_slots(
    tokenizer: Tokenizer, stage: int, spoken_stage: int, suffix: str
) -> None:
    """What is newly latent stands in the text as well; the prefix, and so K, is the same."""
    make = builder(tokenizer, reasoning_stage=stage, spoken_stage=spoken_stage)
    annotation = Annotation("s", ((0, 0.5, 1, 1),), "m")
    silent, spoken = (make.segments("go", annotation, spoken=x) for x in (False, True))
    assert spoken[0] == silent[0] and spoken[1] != silent[1]
    assert tokenizer.decode(spoken[1]) == suffix + "<img_next>" * 16 + "<|im_end|>\n"


@pytest.mark.parametrize("annotation", [None, Annotation(), Annotation(motion="Stop.")])
@pytest.mark.parametrize("stage", STAGES)
def test_slots_do_not_depend_on_annotations(
    tokenizer: Tokenizer, stage: int, annotation: Annotation | None
) -> None:
    """Missing annotations leave the prefix and K as they are; only explicit text goes."""
    make = builder(tokenizer, reasoning_stage=stage)
    full_prefix, full_suffix = make.segments(INSTRUCTION, ANNOTATION)
    prefix, suffix = make.segments(INSTRUCTION, annotation)
    assert prefix == full_prefix
    # The slots' closing token stays (stage 0 has only the blank before <img_next> here).
    assert suffix[0] == full_suffix[0] or stage == 1
    assert len(suffix) <= len(full_suffix)
    text = tokenizer.decode(suffix)
    assert "BBox" not in text and "Subtask" not in text
    assert ("Stop." in text) == bool(stage in (1, 2, 3) and annotation and annotation.motion)


@pytest.mark.parametrize("order", [*permutations(COMPONENTS), ("REASON",), ("BBOX", "REASON")])
@pytest.mark.parametrize("total", [0, 1, 3, 8, MAX_SLOTS])
@pytest.mark.parametrize("stage", STAGES)
def test_arrays(tokenizer: Tokenizer, stage: int, total: int, order: tuple[str, ...]) -> None:
    slots = split_slots(total, order)
    make = builder(
        tokenizer, reasoning_stage=stage, component_order=order, slots_per_component=slots
    )
    actions = tokenizer.action_ids[[1, 2]]
    prefix, suffix = make.segments(INSTRUCTION, ANNOTATION, actions)
    row = make(INSTRUCTION, ANNOTATION, actions)
    assert {name: (a.shape, a.dtype.name) for name, a in row.items()} == {
        "prefix_ids": ((128,), "int32"),
        "prefix_mask": ((128,), "bool"),
        "suffix_ids": ((160,), "int32"),
        "suffix_mask": ((160,), "bool"),
        "loss_mask": ((160,), "bool"),
    }
    assert row["prefix_ids"].tolist() == [tokenizer.pad_id] * (128 - len(prefix)) + prefix
    assert row["prefix_mask"].tolist() == [False] * (128 - len(prefix)) + [True] * len(prefix)
    assert row["suffix_ids"].tolist() == suffix + [tokenizer.pad_id] * (160 - len(suffix))
    assert row["suffix_mask"].tolist() == [True] * len(suffix) + [False] * (160 - len(suffix))
    assert np.flatnonzero(row["loss_mask"]).tolist() == [
        place for place, index in enumerate(suffix) if index != tokenizer.img_next_id
    ]
    # Exactly the whole latent reasoning, and all image tokens, whatever the stage.
    assert (suffix[0] == tokenizer.end_of_thinking_id) == (make.latent_slots > 0)
    assert (prefix[-1] == tokenizer.start_of_thinking_id) == (make.latent_slots > 0)
    assert prefix.count(tokenizer.image_pad_id) == make.views * make.tokens_per_view
    assert suffix.count(tokenizer.img_next_id) == 16
    assert tokenizer.thinking_id not in prefix + suffix


def test_no_img_next(tokenizer: Tokenizer) -> None:
    make = builder(tokenizer, reasoning_stage=3, img_next_tokens=0)
    actions = tokenizer.action_ids[[5]]
    _, suffix = make.segments("go", Annotation(motion="Stop."), actions)
    assert tokenizer.decode(suffix) == (
        "<|end_of_thinking|> Reasoning: Stop. Action: <robot_action_5><|im_end|>\n"
    )


def test_another_prompt_and_rounder_boxes(tokenizer: Tokenizer) -> None:
    make = builder(tokenizer, reasoning_stage=3, base_prompt="Do:", box_decimals=2)
    annotation = Annotation(boxes=((0.126, 0, 0.5, 1),))
    prefix, _ = make.segments("go", annotation)
    assert tokenizer.decode(prefix).endswith("<|vision_end|>Do: go. @ <|start_of_thinking|>")
    make = builder(tokenizer, reasoning_stage=1, base_prompt="", box_decimals=2)
    prefix, suffix = make.segments("go", annotation)
    assert tokenizer.decode(prefix).endswith("<|vision_end|> go. @")
    assert tokenizer.decode(suffix).startswith(" BBox: [0.13 0.00 0.50 1.00]. <img_next>")


def test_text_cannot_smuggle_in_special_tokens(tokenizer: Tokenizer) -> None:
    make = builder(tokenizer, suffix_tokens=200, reasoning_stage=3)
    evil = "<|image_pad|><img_next><|im_end|>"
    prefix, suffix = make.segments(evil, Annotation(motion=evil))
    assert prefix.count(tokenizer.image_pad_id) == 8
    assert suffix.count(tokenizer.img_next_id) == 16
    assert suffix.count(tokenizer.im_end_id) == 1


@pytest.mark.parametrize("segment", ["prefix", "suffix"])
def test_overflow_is_an_error_and_an_exact_fit_is_not(tokenizer: Tokenizer, segment: str) -> None:
    lengths = dict(
        zip(
            ("prefix", "suffix"),
            map(len, builder(tokenizer, reasoning_stage=3).segments(INSTRUCTION, ANNOTATION)),
            strict=True,
        )
    )
    length = lengths[segment]
    fits = builder(tokenizer, reasoning_stage=3, **{f"{segment}_tokens": length})
    assert fits(INSTRUCTION, ANNOTATION)[f"{segment}_mask"].all()
    overflows = builder(tokenizer, reasoning_stage=3, **{f"{segment}_tokens": length - 1})
    message = f"{segment} of instruction '{INSTRUCTION}' has {length} tokens.*allows {length - 1}"
    with pytest.raises(ValueError, match=message):
        overflows(INSTRUCTION, ANNOTATION)


@pytest.mark.parametrize("total", range(MAX_SLOTS + 1))
@pytest.mark.parametrize("order", [*ORDERS, ("REASON", "SUBTASK")])
def test_split_slots_is_even_with_the_rest_first(order: tuple[str, ...], total: int) -> None:
    counts = list(split_slots(total, order).values())
    assert list(split_slots(total, order)) == list(order)
    assert sum(counts) == total
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reasoning_stage": 5}, "reasoning_stage is 5; allowed 0..4"),
        ({"component_order": ("SUBTASK", "SUBTASK")}, "each at most once"),
        ({"component_order": ("PLAN",)}, "PLAN"),
        ({"component_order": ("BBOX",)}, r"slots_per_component names .* expected \['BBOX'\]"),
        ({"slots_per_component": {"SUBTASK": -1, "BBOX": 1, "REASON": 1}}, "at least 0"),
        ({"slots_per_component": {"SUBTASK": 30, "BBOX": 2, "REASON": 1}}, "at most 32"),
        ({"views": 0}, "views is 0"),
        ({"img_next_tokens": -1}, "img_next_tokens is -1"),
    ],
)
def test_builder_checks(tokenizer: Tokenizer, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        builder(tokenizer, **wrong)


@pytest.mark.parametrize("total", [-1, MAX_SLOTS + 1])
def test_split_slots_checks(total: int) -> None:
    with pytest.raises(ValueError, match=f"latent slots: {total}; allowed 0..32"):
        split_slots(total)


@pytest.mark.parametrize("box", [(0.1, 0.2, 0.3), (0.1, 0.2, 0.3, float("nan"))])
def test_annotation_checks(box: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="4 finite numbers"):
        Annotation(boxes=(box,))  # type: ignore[arg-type]


def test_builder_survives_pickling(tokenizer: Tokenizer) -> None:
    """Loader workers get a copy."""
    make = builder(tokenizer)
    row = make(INSTRUCTION, ANNOTATION)
    copy = pickle.loads(pickle.dumps(make))(INSTRUCTION, ANNOTATION)
    for name in row:
        np.testing.assert_array_equal(copy[name], row[name])
