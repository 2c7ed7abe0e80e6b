"""The quick start's report: errors over the right steps, a sentence with the right numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from data_pipelines.index.build import build_index
from data_pipelines.index.format import Index
from data_pipelines.make_tabletop import CollectConfig, make_dataset
from data_pipelines.sampling import StepSource
from lara_jax.evals.demonstrations import NO_MOTION_OPEN
from lara_jax.evals.offline import ActionError
from lara_jax.evals.quickstart_report import error_table, held_out_error, result_sentence
from lara_jax.evals.tabletop import TabletopConfig

HORIZON = 4


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """One held-out tabletop episode."""
    config = CollectConfig(tabletop=TabletopConfig(image_size_px=16), disturb_probability=0.0)
    out = tmp_path_factory.mktemp("data")
    summary = make_dataset(out, config, episodes=1, val_episodes=1)
    return build_index(summary.path, "val")


def steps(index: Index, horizon: int = HORIZON) -> StepSource:
    return StepSource(index=index, views=("primary",), action_horizon=horizon)


class Expert:
    """Answers with the demonstrated chunk of the observed state, `offset` added to dx."""

    def __init__(self, source: StepSource, *, offset: float = 0.0) -> None:
        self.chunks = {
            source[i]["state"].tobytes(): source[i]["actions"] for i in range(len(source))
        }
        self.offset = np.array([offset, 0, 0, 0, 0, 0, 0], np.float32)
        self.calls: list[int] = []

    def __call__(self, observations: Sequence[Any], /) -> np.ndarray:
        self.calls.append(len(observations))
        assert all(seen["primary"].shape == (16, 16, 3) for seen in observations)
        chunks = [self.chunks[seen["state"].tobytes()] for seen in observations]
        return np.stack(chunks) + self.offset


@pytest.mark.parametrize("batch_size", [3, 10])
def test_a_policy_is_compared_with_the_demonstration(index: Index, batch_size: int) -> None:
    policy = Expert(steps(index), offset=0.03)
    errors = held_out_error(policy, steps(index), mean=np.zeros(7), batch_size=batch_size)
    assert errors["policy"].position_m == pytest.approx(0.01, rel=1e-5)
    assert errors["policy"].rotation_rad == 0.0
    assert errors["policy"].gripper_accuracy == 1.0
    assert errors["mean action"].position_m > 0
    assert set(policy.calls) == {batch_size}


def test_previous_action_is_the_one_executed_before(index: Index) -> None:
    source = steps(index, horizon=1)
    errors = held_out_error(Expert(source), source, mean=np.zeros(7), samples=10**6)
    actions = index.actions
    before = np.concatenate([NO_MOTION_OPEN[None], actions[:-1]])
    expected = np.abs(before - actions)[:, :3].mean(dtype=np.float64)
    assert errors["previous action"].position_m == pytest.approx(expected, rel=1e-6)


def test_samples_are_spread_over_the_split(index: Index) -> None:
    policy = Expert(steps(index))
    held_out_error(policy, steps(index), mean=np.zeros(7), samples=5, batch_size=2)
    assert policy.calls == [2, 2, 2]


def test_sentence_and_table_name_their_numbers() -> None:
    errors = {
        name: ActionError(position_m=value, rotation_rad=0.02, gripper_accuracy=0.9)
        for name, value in (("policy", 0.0031), ("mean action", 0.0062), ("previous action", 0.005))
    }
    closed_loop = {
        "episodes": 20,
        "successes": 13,
        "ci_low": 0.43,
        "ci_high": 0.82,
        "latent_slots": 3,
    }
    sentence = result_sentence(900, errors, closed_loop)
    for part in ("900 training steps", "13 of 20", "43 to 82 %", "3.1 mm", "6.2 mm", "5.0 mm"):
        assert part in sentence
    assert sentence.count("\n") == 0
    assert [line.split()[-1] for line in error_table(errors).splitlines()[2:]] == ["90"] * 3
