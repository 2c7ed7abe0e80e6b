"""Which step belongs to which stage, what a stage may be, and how one anneals."""

import pytest

from lara_jax.curriculum import (
    PAPER_ORDER,
    Stage,
    in_steps,
    paper_stages,
    pretrain_stage,
    silent_share,
    spans,
)


def stage(name: str, **settings) -> Stage:
    return Stage(**({"name": name, "action_weight": 1.0} | settings))


@pytest.mark.parametrize(
    ("stages", "steps", "expected"),
    [
        ([("a", {"share": 10.0}), ("b", {"share": 5.0}), ("c", {"share": 5.0})], 8, [4, 6, 8]),
        ([("a", {"steps": 3}), ("b", {}), ("c", {"steps": 2})], 10, [3, 8, 10]),
        ([("a", {}), ("b", {"steps": 4}), ("c", {"share": 3.0})], 12, [2, 6, 12]),
        ([("a", {"steps": 3}), ("b", {"steps": 2})], 5, [3, 5]),
    ],
)
def test_steps_are_divided_by_length_then_by_share(stages, steps, expected) -> None:
    found = spans([stage(name, **settings) for name, settings in stages], steps)
    assert [end for _, _, end in found] == expected
    assert [start for _, start, _ in found] == [0, *expected[:-1]]


def test_a_stage_without_a_step_is_left_out() -> None:
    found = spans([stage("a", steps=5), stage("b")], 5)
    assert [(x.name, start, end) for x, start, end in found] == [("a", 0, 5)]


@pytest.mark.parametrize("steps", [4, 6])
def test_lengths_have_to_add_up(steps: int) -> None:
    with pytest.raises(ValueError, match=f"take 5 steps, but train.steps is {steps}"):
        spans([stage("a", steps=3), stage("b", steps=2)], steps)


def test_examples_are_rounded_up_to_steps() -> None:
    found = in_steps([stage("a", examples=33), stage("b", steps=7), stage("c")], batch_size=16)
    assert [(x.steps, x.examples) for x in found] == [(3, 0), (7, 0), (0, 0)]


def test_rows_fall_silent_in_proportion() -> None:
    annealed = stage("a", anneal=0.5)
    assert [silent_share(annealed, 10, 30, step) for step in (10, 15, 20, 29)] == [0, 0.5, 1, 1]
    assert silent_share(stage("b"), 10, 30, 10) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 3, "examples": 4}, "steps or examples"),
        ({"steps": -1}, "steps or examples"),
        ({"anneal": 1.5}, "anneal is 0 to 1"),
        ({"anneal": 0.5, "reasoning_stage": 1}, "only where something is newly latent"),
        ({"discrete_actions": True}, "without a token_weight teach nothing"),
        ({"reasoning_stage": 5}, "reasoning_stage must be 0 to 4"),
    ],
)
def test_impossible_stages_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        stage("a", **settings)


def test_the_papers_stages() -> None:
    """Losses and weights of arXiv 2602.01166; discrete actions everywhere but in Stage III."""
    made = paper_stages(explicit=1, latent=(1, 1, 1), action=2, suffix_tokens=(9, 8, 7, 6, 5))
    stages = [Stage(name=name, **made[name]) for name in PAPER_ORDER]
    assert [x.reasoning_stage for x in stages] == [1, 2, 3, 4, 4]
    assert [x.discrete_actions for x in stages] == [True] * 4 + [False]
    assert [x.visual_weight for x in stages] == [0.1, 0.2, 0.2, 0.2, 0.0]
    assert [x.token_weight for x in stages] == [1, 1, 1, 1, 0]
    assert [x.trains for x in stages] == ["backbone"] * 4 + ["full"]
    before = Stage(name="pretrain", **pretrain_stage(suffix_tokens=9))
    assert (before.reasoning_stage, before.discrete_actions, before.trains) == (0, True, "full")
    assert (before.token_weight, before.visual_weight, before.action_weight) == (1, 0.1, 1)
