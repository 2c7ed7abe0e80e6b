"""The log: what counts as a run's time, losses by dataset, and no number where there is none."""

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from lara_jax import run_log, train
from lara_jax.config import Recipe, load_recipe
from lara_jax.run_log import Log
from tests.soak import tiny

ROWS = 4


class Clock:
    """A time that only moves when it is told to, s."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(run_log, "time", made)
    return made


@pytest.fixture
def recipe(repository: Path) -> Recipe:
    return load_recipe(repository / "configs/debug.py", [f"data.batch_size={ROWS}"])


NOTHING = (0, 0)


def metrics(loss: float = 1.0, by_dataset: Any = (((1, 1), NOTHING),) * 2) -> dict[str, Any]:
    """`by_dataset`: of two datasets, rows that are not annotated and that are, sum and count."""
    parts = {"token": jnp.asarray(by_dataset, jnp.float32)}
    return {"loss": jnp.float32(loss), "loss_token": jnp.float32(loss), "by_dataset": parts}


def started(recipe: Recipe, workdir: Path) -> Log:
    """In a stage of two datasets."""
    log, batches = Log(recipe, workdir, 0), [SimpleNamespace()]
    next(log.batches(batches, datasets=["a", "b"], step_flops=1))  # type: ignore[arg-type]
    return log


def read(workdir: Path, name: str) -> list[dict[str, str]]:
    with (workdir / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_speed_leaves_out_compilation_and_evaluation(
    recipe: Recipe, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(run_log, "mfu", lambda *args, **_: given.append(args) or 0.25)

    def batches() -> Iterator[int]:
        for number in range(5):
            clock.now += 1  # the loop waits
            yield number

    log, stage = Log(recipe, tmp_path, 0), recipe.stages[0]
    for number in log.batches(batches(), datasets=["a", "b"], step_flops=7):  # type: ignore[arg-type]
        clock.now += 1000 if number == 0 else 3  # compiles, or works
        log.advance(metrics())
        if number == 1:
            with log.paused():
                clock.now += 500  # evaluates
        if number in (0, 2, 4):
            log.write(number + 1, stage, metrics())
    log.close()
    first, second, third = read(tmp_path, "metrics")
    assert [first[name] for name in ("samples_per_second", "data_wait_fraction", "mfu")] == [""] * 3
    # Two steps of one second of waiting and three of work.
    assert float(second["samples_per_second"]) == 2 * ROWS / 8
    assert float(second["data_wait_fraction"]) == 0.25
    assert float(second["mfu"]) == 0.25
    assert [args[:2] for args in given] == [(14, 8.0)] * 2
    assert third["samples_per_second"] == second["samples_per_second"]
    assert second["device_memory_gb"] == ""  # a CPU does not say


def test_losses_of_a_dataset_are_means_over_all_steps_since_the_last_row(
    recipe: Recipe, tmp_path: Path
) -> None:
    log, stage = started(recipe, tmp_path), recipe.stages[0]
    of_steps = (
        ((NOTHING, (6, 2)), (NOTHING, NOTHING)),
        (((1, 1), (1, 1)), ((5, 1), NOTHING)),
        ((NOTHING, (9, 3)), (NOTHING, NOTHING)),
    )
    for step, parts in enumerate(of_steps, start=1):
        log.advance(metrics(by_dataset=parts))
        if step > 1:
            log.write(step, stage, metrics())
    log.close()
    rows = [(r["step"], r["dataset"], r["metric"], r["value"]) for r in read(tmp_path, "datasets")]
    assert rows == [
        ("2", "a", "loss_token", "2.0"),
        ("2", "b", "loss_token", "5.0"),
        ("2", "(not annotated)", "loss_token", "3.0"),
        ("2", "(annotated)", "loss_token", str(7 / 3)),
        ("3", "a", "loss_token", "3.0"),
        ("3", "(annotated)", "loss_token", "3.0"),
    ]


def test_what_is_no_number_stays_empty(recipe: Recipe, tmp_path: Path) -> None:
    log = started(recipe, tmp_path)
    log.advance(metrics())
    skipped = metrics(float("nan")) | {"skipped": jnp.int32(1)}
    values = log.write(1, recipe.stages[0], skipped)
    log.close()
    assert "loss" not in values
    (row,) = read(tmp_path, "metrics")
    assert (row["loss"], row["skipped"]) == ("", "1.0")


def test_evaluation_is_written_and_averaged_over_datasets(recipe: Recipe, tmp_path: Path) -> None:
    log = Log(recipe, tmp_path, 0)
    scores = {("a", "position_m"): 0.01, ("b", "position_m"): 0.03, ("b", "loss_token"): 2.0}
    means = log.write_evaluation(5, recipe.stages[0], scores)
    log.close()
    assert means == {"eval_position_m": pytest.approx(0.02), "eval_loss_token": 2.0}
    rows = [(r["step"], r["dataset"], r["metric"], r["value"]) for r in read(tmp_path, "eval")]
    assert rows[0] == ("5", "a", "position_m", "0.01")
    assert len(rows) == 3


def test_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    full, fuller, silent = ({"peak_bytes_in_use": 2e9}, {"peak_bytes_in_use": 3e9}, None)
    for stats, gigabytes in (((full, fuller), 3.0), ((silent, full), 2.0), ((silent,), None)):
        devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
        monkeypatch.setattr(run_log.jax, "local_devices", lambda devices=devices: devices)
        assert run_log.device_memory_gb() == gigabytes


def test_a_row_is_of_one_stage(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a stage ends between two rows that are due."""
    tiny.use_tiny_model(monkeypatch.setattr)
    settings = {
        "data.path": tiny.write_data(tmp_path / "data", 4),
        "data.batch_size": 4,
        "train.steps": 6,
        "train.stages": "latent_1,action",
        "stages.latent_1.share": 1,
        "stages.action.share": 1,
        "log.every_steps": 2,
        "checkpoint.every_steps": 6,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    train.train(load_recipe(repository / "configs" / "debug.py", overrides), tmp_path / "run")
    rows = [(row["step"], row["stage"]) for row in read(tmp_path / "run", "metrics")]
    assert rows == [("2", "latent_1"), ("3", "latent_1"), ("4", "action"), ("6", "action")]
    losses = {(row["stage"], row["metric"]) for row in read(tmp_path / "run", "datasets")}
    assert losses == {("latent_1", "loss_token"), ("action", "loss_action")}
