"""Metrics: stable columns, no step twice after a resume, and what is no number stops the run."""

import csv
from pathlib import Path

import numpy as np
import pytest

from lara_jax.metrics import COLUMNS, MetricsWriter, check_finite


def write(workdir: Path, first: int, last: int, value: float) -> None:
    writer = MetricsWriter(workdir, start_step=first - 1, steps=10)
    for step in range(first, last + 1):
        writer.advance()
        writer.write(step, "stage", {"loss": value, "samples_per_second": 2.0})
    writer.close()


def read(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_rows_after_the_checkpoint_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, 1, 5, 1.0)
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("3,sta")  # cut off by a kill, and its number looks like an old step's
    write(tmp_path, 4, 6, 2.0)
    assert [(row["step"], row["loss"]) for row in read(tmp_path)] == [
        ("1", "1.0"),
        ("2", "1.0"),
        ("3", "1.0"),
        ("4", "2.0"),
        ("5", "2.0"),
        ("6", "2.0"),
    ]


def test_columns_are_always_the_same(tmp_path: Path) -> None:
    write(tmp_path, 1, 1, 1.0)
    (row,) = read(tmp_path)
    assert tuple(row) == COLUMNS
    assert row["loss_action"] == ""
    writer = MetricsWriter(tmp_path, start_step=1, steps=10)
    with pytest.raises(ValueError, match="loss_sound"):
        writer.write(2, "s", {"loss": 1.0, "samples_per_second": 1.0, "loss_sound": 1.0})
    writer.close()


def test_a_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,mse\n1,0.5\n")
    with pytest.raises(ValueError, match=r"\['step', 'mse'\]"):
        MetricsWriter(tmp_path, start_step=1, steps=10)


def test_what_is_no_number_is_reported_with_its_samples() -> None:
    check_finite(3, {"loss": 1.0}, np.array([4, 5]))
    with pytest.raises(FloatingPointError, match=r"step 3: loss = nan; samples \[4, 5\]"):
        check_finite(3, {"loss": float("nan"), "gradient_norm": 1.0}, np.array([4, 5]))
