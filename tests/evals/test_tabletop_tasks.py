"""Task families: each instruction means one thing in its scene, and the expert reaches it.

What an instruction means is worked out here from its words and from where things lie, by another
way than the families propose their goals.
"""

import re
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("mujoco")

from lara_jax.evals.tabletop import (
    FAMILIES,
    SPLITS,
    TabletopConfig,
    TabletopEnv,
    Task,
    episode_seed,
    expert_step,
)
from lara_jax.evals.tabletop.layout import WITHIN_M
from lara_jax.evals.tabletop.tasks import Goal, Layout, Move, propose_task

EPISODES = 25
Scene = dict[str, np.ndarray]  # positions by the names of bodies

# Each sentence as the moves that it asks for, by the words of their blocks and targets.
SENTENCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"first put the (.+) on the (.+), then put the (.+) on the (.+)", ("12", "34")),
    (r"before putting the (.+) on the (.+), put the (.+) on the (.+)", ("34", "12")),
    (r"put the (.+) on the (.+) after putting the (.+) on the (.+)", ("34", "12")),
    (r"put the (.+) on the (.+) and only then the (.+) on the (.+)", ("12", "34")),
    (r"clear the (.+), then put the (.+) on it", ("21",)),
    (r"put the (.+) on the (.+), with no other block on it", ("12",)),
    (r"let the (.+) be the only one on the (.+)", ("12",)),
    (r"swap the block on the (.+) for the (.+)", ("21",)),
    (r"build a tower with the (.+) on top of the (.+)", ("12",)),
    (r"(?:stack|put|set) the (.+?) (?:down )?on the (.+)", ("12",)),
    (r"move the (.+) onto the (.+)", ("12",)),
    (r"the (.+) should carry the (.+)", ("21",)),
)
AHEAD = {"left of": (1, 1), "right of": (1, -1), "behind": (0, 1), "in front of": (0, -1)}


def referents(words: str, scene: Scene) -> list[str]:
    """All that a referring expression may mean in a scene."""
    if match := re.fullmatch(r"(\w+) (block|plate)", words):
        return [name for name in scene if name == f"{match[1]}_{match[2]}"]
    if match := re.fullmatch(r"plate that is not (\w+)", words):
        return [name for name in scene if name.endswith("plate") and not name.startswith(match[1])]
    blocks = [name for name in scene if name.endswith("_block")]
    if match := re.fullmatch(r"block that is neither (\w+) nor (\w+)", words):
        return [name for name in blocks if not name.startswith(match.groups())]
    if match := re.fullmatch(r"block (left of|right of|behind|in front of) the (\w+) one", words):
        axis, sign = AHEAD[match[1]]
        line = sign * scene[f"{match[2]}_block"][axis]
        return [name for name in blocks if sign * scene[name][axis] > line]
    if match := re.fullmatch(r"(\w+) block from the (left|right)", words):
        rank = ("first", "second", "third", "fourth").index(match[1])
        row = sorted(blocks, key=lambda name: scene[name][1], reverse=match[2] == "left")
        return [row[rank]]
    raise AssertionError(f"nothing is known about {words!r}")


def meant(instruction: str, scene: Scene) -> list[tuple[list[str], list[str]]]:
    """The blocks and targets that an instruction may mean, in the order it asks for."""
    for pattern, moves in SENTENCES:
        if match := re.fullmatch(pattern, instruction):
            return [
                (referents(match[int(block)], scene), referents(match[int(target)], scene))
                for block, target in moves
            ]
    raise AssertionError(f"no sentence is like {instruction!r}")


def episodes(
    split: str, family: str, count: int = EPISODES, image_size_px: int = 16
) -> Iterator[tuple[TabletopEnv, Scene]]:
    env = TabletopEnv(
        TabletopConfig(families=(family,), split=split, image_size_px=image_size_px, shadows=False)
    )
    plates = [f"{colour}_plate" for colour in SPLITS[split].plates]
    for index in range(count):
        env.reset(seed=episode_seed(0, split, index))
        yield env, {name: env.centre_m(name) for name in (*env.block_names, *plates)}


@pytest.mark.parametrize("split", ["train", "eval_colours", "eval_positions", "eval_phrasings"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_instruction_means_one_thing(family: str, split: str) -> None:
    goals = set()
    for env, scene in episodes(split, family):
        wanted = [
            (move.block, move.target) for move in env.moves if not move.off
        ]  # the way to clear a plate is free
        assert meant(env.task.instruction, scene) == [([b], [t]) for b, t in wanted], (
            env.task.instruction
        )
        assert env.task.family == family and not env.success
        goals.add(env.task.instruction)
    assert len(goals) > 4


def test_a_cleared_plate_has_one_block_on_it_before() -> None:
    for env, scene in episodes("train", "two_stage"):
        away, put = env.moves
        on = [
            name
            for name in env.block_names
            if np.hypot(*(scene[name] - scene[put.target])[:2]) < env.config.plate_radius_m
        ]
        assert on == [away.block] and away.off == put.target != away.target
        assert not env.placed(away) and env.placed(Move(block=away.block, target=put.target))


@pytest.mark.parametrize(
    ("family", "right", "red_green_blue"),
    [
        ("relation", True, [(0.0, 0.1), (0.0, 0.0), (0.0, -0.1)]),
        ("relation", False, [(0.0, 0.01), (0.0, 0.0), (0.0, -0.01)]),
        ("ordinal", True, [(0.0, 0.1), (0.0, 0.0), (0.0, -0.1)]),
        ("ordinal", False, [(0.0, 0.1), (0.1, 0.09), (0.0, -0.1)]),
    ],
)
def test_no_task_is_proposed_where_it_would_be_ambiguous(
    family: str, red_green_blue: list[tuple[float, float]], *, right: bool
) -> None:
    blocks = dict(zip(("red", "green", "blue"), map(np.array, red_green_blue), strict=True))
    layout = Layout(blocks=blocks, plates={"yellow": np.zeros(2), "purple": np.ones(2)})
    random = np.random.default_rng(0)
    proposed = {
        task.instruction
        for _ in range(200)
        if (task := propose_task(family, layout, random, held_out_phrasings=False))
    }
    assert bool(proposed) == right
    if right and family == "relation":  # the middle one has one block on either side
        assert {text.split(" on ")[0] for text in proposed} == {
            "put the block left of the green one",
            "put the block right of the green one",
        }


def combinations(split: str) -> set[tuple[str, str]]:
    """What is put on what, over all families."""
    return {
        (move.block, move.target)
        for family in FAMILIES
        for env, _ in episodes(split, family)
        for move in env.moves
    }


def test_training_has_no_held_out_colours() -> None:
    trained = combinations("train") | combinations("eval")
    held_out = combinations("eval_colours")
    assert len(trained) > 12 and len(held_out) > 12
    assert not trained & held_out
    things = {thing for pair in trained for thing in pair}
    assert not things & {"yellow_block", "purple_block", "green_plate", "blue_plate", "red_plate"}


def test_training_has_no_held_out_positions() -> None:
    def outside(position: np.ndarray) -> bool:
        return bool((abs(position[:2]) > WITHIN_M).any())

    for family in FAMILIES:
        for split in ("train", "eval"):
            for _, scene in episodes(split, family, 10):
                assert not any(map(outside, scene.values()))
        seen = 0
        for env, scene in episodes("eval_positions", family, 10, 48):
            last = env.moves[-1].block
            assert outside(scene[last])
            seen += np.isfinite(env.boxes(last)).all()
        assert seen >= 8  # the gripper may stand before it


def test_training_has_no_held_out_phrasings() -> None:
    for name, family in FAMILIES.items():
        assert not set(family.phrasings) & set(family.held_out_phrasings)
        for split, allowed in (
            ("train", family.phrasings),
            ("eval_phrasings", family.held_out_phrasings),
        ):
            used = set()
            for env, _ in episodes(split, name):
                slots = env.task.goal.words
                said = [text for text in allowed if text.format(**slots) == env.task.instruction]
                assert len(said) == 1
                used.update(said)
            assert used == set(allowed)


def solve(env: TabletopEnv, disturb_m: float, seed: int) -> list[np.ndarray]:
    """The actions of the disturbed expert."""
    random, actions, truncated = np.random.default_rng(seed), [], False
    while not (step := expert_step(env)).done and not truncated:
        action = step.action.astype(np.float64)
        action[:3] += random.normal(0, disturb_m, 3) * (random.random() < 0.3)
        truncated = env.step(action)[3]
        actions.append(action)
    return actions


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_solves_disturbed_episodes(family: str) -> None:
    for index, (env, _) in enumerate(episodes("eval", family, 4)):
        moved = {env.centre_m(name).tobytes() for name in env.block_names}
        solve(env, 0.012, index)
        assert env.success and env.steps < env.step_limit
        assert {env.centre_m(name).tobytes() for name in env.block_names} != moved
        for move in env.moves:
            height = env.centre_m(move.block)[2] - env.top_m(move.target)[2]
            assert height == pytest.approx(env.config.block_half_m, abs=8e-3)


def test_the_order_of_the_moves_is_part_of_the_goal() -> None:
    for env, _ in episodes("eval", "order", 3):
        seed = episode_seed(0, "eval", 0)
        env.reset(seed=seed)
        task = env.task
        backwards = Goal(moves=task.goal.moves[::-1], words=task.goal.words, in_order=True)
        env._task = Task(family="order", instruction=task.instruction, goal=backwards)
        actions = solve(env, 0.0, 0)
        assert env.success
        env.reset(seed=seed)
        for action in actions:
            assert not env.step(action)[2]
        assert all(map(env.placed, env.moves))


def test_a_placed_block_that_is_taken_away_is_put_back() -> None:
    """The expert has no memory: it sees what is not done."""
    (env, _) = next(iter(episodes("eval", "order", 1)))
    first, second = env.moves
    while not env.placed(second) or env.gripper_opening < 0.9:
        env.step(expert_step(env).action)
    assert env.success
    joint = env.model.body(first.block).jntadr[0]
    env.data.qpos[env.model.jnt_qposadr[joint] :][:3] = (0.2, 0.25, 0.02)
    while expert_step(env).subtask == "retreat":
        env.step(np.array([0, 0, 0.05, 0, 0, 0, 1]))
    assert expert_step(env).subtask.endswith(first.block.replace("_", " "))
    solve(env, 0.0, 0)
    assert env.success


def test_family_can_be_asked_for_and_is_drawn_otherwise() -> None:
    env = TabletopEnv(TabletopConfig(families=("place", "ordinal"), image_size_px=16))
    for family, blocks in (("ordinal", 4), ("place", 3)):
        _, info = env.reset(seed=1, options={"family": family})
        assert info == {"family": family} and len(env.block_names) == blocks
        assert env.step(np.zeros(7))[4] == info
    drawn = {env.reset(seed=seed)[1]["family"] for seed in range(20)}
    assert drawn == {"place", "ordinal"}
