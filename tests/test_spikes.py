"""Which steps do not count, and that the run says so."""

import csv
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax import train
from lara_jax.checkpoint import load_params, steps
from lara_jax.config import SpikeConfig, load_recipe
from lara_jax.spikes import FEWEST, WINDOW, SkipReport, Spikes, judge, no_spikes, resumed
from tests.data_pipelines.handmade import write_tabletop

CONFIG = SpikeConfig(factor=10.0, max_in_a_row=2)
JUDGE = jax.jit(judge, static_argnums=(3, 4, 5))


def after(norms: list[float], *, loss: float = 1.0, stage: str = "s") -> tuple[Spikes, list[bool]]:
    """The state after steps with these gradient norms, and which of them counted."""
    spikes, counted = no_spikes(), []
    for norm in norms:
        counts, spikes, _ = JUDGE(spikes, jnp.float32(loss), jnp.float32(norm), stage, CONFIG, 1.0)
        counted.append(bool(counts))
    return spikes, counted


USUAL = [2.0, 3.0, 4.0, 3.0] * (WINDOW // 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_never_counts(bad: float) -> None:
    assert after([bad, 1.0])[1] == [False, True]
    assert after([1.0], loss=bad)[1] == [False]


def test_a_gradient_far_above_the_usual_does_not_count() -> None:
    """Once there is a usual: the median of at most 64 steps and at least 16, here 3."""
    spikes, counted = after([*USUAL, 29.0, 31.0, 5.0, 31.0])
    assert counted == [True] * WINDOW + [True, False, True, False]
    assert int(spikes.skipped) == 2 and int(spikes.in_a_row) == 1
    assert not after([*USUAL[:FEWEST], 31.0])[1][-1]
    assert after([*USUAL[1:FEWEST], 1e6])[1][-1]  # one step short


def test_a_loss_far_above_the_usual_does_not_count_if_its_gradient_matters() -> None:
    spikes, _ = after(USUAL)
    for loss, norm, expected in ((9.0, 3.0, True), (11.0, 3.0, False), (11.0, 0.5, True)):
        counts, _, _ = JUDGE(spikes, jnp.float32(loss), jnp.float32(norm), "s", CONFIG, 1.0)
        assert bool(counts) is expected, (loss, norm)


def test_after_too_many_none_counts_until_the_run_is_started_again() -> None:
    spikes, counted = after([*USUAL, 1e3, 1e3, 3.0, 3.0])
    assert counted[WINDOW:] == [False] * 4 and int(spikes.in_a_row) == 4
    spikes = resumed(spikes, CONFIG)
    counts, spikes, _ = JUDGE(spikes, jnp.float32(1), jnp.float32(3), "s", CONFIG, 1.0)
    assert counts and int(spikes.skipped) == 4
    spikes, _ = after([*USUAL, 1e3])
    assert int(resumed(spikes, CONFIG).in_a_row) == 1


def test_a_skipped_gradient_does_not_become_usual() -> None:
    spikes, _ = after(USUAL)
    again, counted = after([*USUAL, *[1e3] * WINDOW])
    assert not any(counted[WINDOW:])
    np.testing.assert_array_equal(spikes.recent, again.recent)


def test_what_clipping_allows_always_counts() -> None:
    assert after([*[1e-6] * WINDOW, 0.99, 1.01])[1][-2:] == [True, False]


def test_every_stage_has_its_own_usual() -> None:
    spikes, _ = after(USUAL)
    one = jnp.float32(1.0)
    assert not JUDGE(spikes, one, jnp.float32(100.0), "s", CONFIG, 1.0)[0]
    counts, other, verdict = JUDGE(spikes, one, jnp.float32(100.0), "t", CONFIG, 1.0)
    assert counts and np.isfinite(np.asarray(other.recent)).sum() == 2
    assert np.isnan(float(verdict["usual_norm"]))


def test_factor_zero_skips_only_what_is_not_finite() -> None:
    spikes, _ = after(USUAL)
    never = dataclasses.replace(CONFIG, factor=0.0)
    for norm, expected in ((1e30, True), (jnp.inf, False)):
        counts, _, _ = JUDGE(spikes, jnp.float32(1.0), jnp.float32(norm), "s", never, 1.0)
        assert bool(counts) is expected


def batch(number: int) -> Any:
    """Two rows of two datasets."""
    return SimpleNamespace(dataset=np.array([1, 0]), sample_id=np.array([number, number + 1]))


def verdict(in_a_row: int) -> dict[str, jax.Array]:
    numbers = {"in_a_row": in_a_row, "loss": jnp.nan, "gradient_norm": 50.0}
    numbers |= {"usual_loss": 1.0, "usual_norm": 3.0}
    return {name: jnp.asarray(value) for name, value in numbers.items()}


def test_a_skipped_step_is_reported_with_its_samples(capsys: pytest.CaptureFixture[str]) -> None:
    """As soon as the next step is on its way; the last one when the run ends."""
    report = SkipReport(["bridge", "kuka"], CONFIG)
    report.follow(1, verdict(0), batch(10))
    report.follow(2, verdict(1), batch(20))
    assert capsys.readouterr().err == ""
    report.follow(3, verdict(0), batch(30))
    assert capsys.readouterr().err == (
        "step 2 skipped, 1 in a row: loss nan, gradient norm 50 (usually 1 and 3); "
        "samples kuka:20 bridge:21\n"
    )
    report.follow(4, verdict(1), batch(40))
    report.finish()
    assert "step 4 skipped" in capsys.readouterr().err
    report.stop_if_too_many(4)


def test_too_many_in_a_row_end_the_run() -> None:
    report = SkipReport(["bridge", "kuka"], CONFIG)
    for step in (1, 2):
        report.follow(step, verdict(step), batch(step))
    assert not report.too_many
    report.finish()
    assert report.too_many
    message = "2 steps in a row were skipped (config.spike.max_in_a_row)"
    with pytest.raises(FloatingPointError, match=re.escape(message)):
        report.stop_if_too_many(2)


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"factor": -2.0}, {"max_in_a_row": 0}])
def test_limits_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SpikeConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_that_only_skips_stops_with_a_checkpoint(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate of 1e38 destroys the parameters in the first step: no step after it counts."""
    data = write_tabletop(tmp_path / "lara_tabletop")
    overrides = [f"data.path={data}", "train.stages=action", "train.steps=9", "data.batch_size=2"]
    overrides += ["optimizer.warmup_fraction=0", "optimizer.expert_rate=1e38"]
    overrides += ["spike.max_in_a_row=2", "log.every_steps=1"]
    recipe = load_recipe(repository / "configs/debug.py", overrides)
    with pytest.raises(FloatingPointError, match="2 steps in a row were skipped"):
        train.train(recipe, tmp_path / "run")
    said = capsys.readouterr().err
    for step, in_a_row in ((2, 1), (3, 2), (4, 3)):
        assert re.search(
            rf"step {step} skipped, {in_a_row} in a row: .*; samples lara_tabletop:\d+ "
            r"lara_tabletop:\d+\n",
            said,
        )
    assert steps(tmp_path / "run/checkpoints") == [4]
    expert = load_params(tmp_path / "run")["action_expert"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expert))
    with (tmp_path / "run/metrics.csv").open() as stream:
        assert [row["skipped"] for row in csv.DictReader(stream)] == ["0.0", "1.0", "2.0", "3.0"]
