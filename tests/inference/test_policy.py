"""The policy: physical actions out of raw observations, and what it refuses."""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.accumulator import Accumulator
from data_pipelines.oxe.registry import spec_named
from data_pipelines.statistics import DatasetStatistics, normalizers
from lara_jax import assemble
from lara_jax.checkpoint import RunInfo
from lara_jax.config import load_recipe
from lara_jax.inference.policy import Policy
from tests.interop.models import abstract_params, random_params

RECIPE = load_recipe(Path(__file__).parents[2] / "configs" / "debug.py")


@cache
def statistics() -> DatasetStatistics:
    rng = np.random.default_rng(0)
    spec = spec_named("lara_tabletop")
    action, state = Accumulator(7), Accumulator(8)
    action.update(rng.normal(0, 0.02, (50, 7)).astype(np.float32))
    state.update(rng.normal(0, 0.2, (50, 8)).astype(np.float32))
    return DatasetStatistics(
        dataset=spec.name,
        steps=50,
        episodes=2,
        action=action.result(),
        state=state.result(),
        action_modes=spec.action_modes,
        state_modes=spec.state_modes,
        action_encoding=spec.action_encoding,
        state_encoding=spec.state_encoding,
        absolute_action=spec.absolute_action,
        control_hz=spec.control_hz,
    )


@cache
def info() -> RunInfo:
    tokenizer = assemble.load_recipe_tokenizer(RECIPE)
    return RunInfo(
        recipe=RECIPE,
        statistics={"lara_tabletop": statistics().to_dict()},
        tokenizer=assemble.tokenizer_to_text(tokenizer),
    )


@cache
def params():
    tokenizer = assemble.tokenizer_from_text(info().tokenizer)
    return random_params(abstract_params(assemble.model_config(RECIPE, tokenizer, latent_slots=0)))


def observation(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "primary": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "state": rng.normal(0, 0.2, 8).astype(np.float32),
        "instruction": "put the red block on the yellow plate",
    }


def with_last_stage(**changes) -> RunInfo:
    stage = dataclasses.replace(RECIPE.stages[-1], **changes)
    recipe = dataclasses.replace(RECIPE, stages=(*RECIPE.stages[:-1], stage))
    return dataclasses.replace(info(), recipe=recipe)


@pytest.mark.slow
def test_acts_on_every_observation_by_itself():
    """A chunk per observation, the same whatever stands beside it; noise differs between calls."""
    policy, again = (Policy(info(), params()) for _ in range(2))
    assert policy.latent_slots == 3 and policy.views == ("primary",)
    chunks = policy([observation(0), observation(1)])
    assert chunks.shape == (2, 8, 7) and chunks.dtype == np.float32
    swapped = again([observation(0), observation(2)])
    np.testing.assert_allclose(chunks[0], swapped[0], atol=1e-5)
    assert np.abs(chunks[1] - swapped[1]).max() > 1e-4
    assert np.abs(policy([observation(0), observation(1)]) - chunks).max() > 1e-4
    # Physical units: within the statistics' percentiles, where [-1, 1] would be far outside.
    motion = normalizers(statistics())[0]
    low, high = (motion.unnormalize(np.full((1, 7), x, np.float32))[0, :6] for x in (-1, 1))
    assert (chunks[..., :6] >= low - 1e-6).all() and (chunks[..., :6] <= high + 1e-6).all()


@pytest.mark.slow
def test_depth_is_chosen_when_acting():
    shallow = Policy(info(), params(), latent_slots=1)
    assert shallow.latent_slots == 1
    deep = Policy(info(), params())([observation()])
    assert np.abs(shallow([observation()]) - deep).max() > 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"primary": None}, r"no frame in any of \['primary'\]"),
        ({"primary": np.zeros((64, 64, 3), np.float32)}, "must be uint8.*float32"),
        (
            {"primary": np.zeros((64, 64), np.uint8)},
            r"must be uint8\[H, W, 3\], got uint8\[64, 64\]",
        ),
        ({"state": np.full(8, np.nan)}, "state must be 8 finite numbers"),
        ({"state": np.zeros(7)}, "state must be 8 finite numbers"),
    ],
)
def test_refuses_wrong_observations(change, message):
    with pytest.raises(ValueError, match=message):
        Policy(info(), params())([observation() | change])


def test_a_view_has_to_be_there_but_may_be_none():
    """A camera that is missing, or a step before the episode, is black and masked, as trained."""
    seen = observation()
    del seen["primary"]
    with pytest.raises(ValueError, match=r"lacks the views \['primary'\]"):
        Policy(info(), params())([seen])
    data = dataclasses.replace(RECIPE.data, views=("wrist", "primary"), prefix_tokens=160)
    recipe = dataclasses.replace(RECIPE, data=data)
    batch = Policy(dataclasses.replace(info(), recipe=recipe), params()).batch(
        [observation() | {"wrist": None}, observation(1) | {"wrist": observation(2)["primary"]}]
    )
    np.testing.assert_array_equal(batch.view_mask, [[False, True], [True, True]])
    assert not batch.images[0, 0].any()
    np.testing.assert_array_equal(batch.images[0, 1], observation()["primary"])


def test_refuses_stages_it_cannot_act_in():
    with pytest.raises(ValueError, match="explicit reasoning text, which a policy does not write"):
        Policy(with_last_stage(reasoning_stage=1), params())
    with pytest.raises(ValueError, match="trained without reasoning and has no slots"):
        Policy(with_last_stage(reasoning_stage=0), params(), latent_slots=2)
    with pytest.raises(ValueError, match="33"):
        Policy(info(), params(), latent_slots=33)


def test_a_policy_of_several_robots_is_told_which_one_it_is():
    both = {name: statistics().to_dict() for name in ("lara_tabletop", "bridge_dataset")}
    several = dataclasses.replace(info(), statistics=both)
    with pytest.raises(ValueError, match="say which of: bridge_dataset, lara_tabletop"):
        Policy(several, {})
    with pytest.raises(ValueError, match="not trained on dataset 'kuka', but on: bridge_dataset"):
        Policy(several, {}, dataset="kuka")
    assert Policy(several, {}, dataset="bridge_dataset").views == ("primary",)
    with pytest.raises(ValueError, match="holds no statistics of actions and states"):
        Policy(dataclasses.replace(info(), statistics={}), {})
