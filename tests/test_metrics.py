"""Metrics: stable columns, no step twice after a resume, the same numbers everywhere."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lara_jax.checkpoint_files import SaveFailed
from lara_jax.metrics import COLUMNS, SCORE_COLUMNS, MetricsWriter


def write(workdir: Path, first: int, last: int, value: float) -> None:
    writer = MetricsWriter(workdir, start_step=first - 1, steps=10)
    for step in range(first, last + 1):
        writer.advance()
        writer.write(step, "stage", {"loss": value, "samples_per_second": 2.0})
    writer.close()


def read(workdir: Path, name: str = "metrics") -> list[dict[str, str]]:
    with (workdir / f"{name}.csv").open() as stream:
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


def test_a_file_with_other_columns_is_kept_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "step,mse,loss\n1,0.5,0.25\n2,0.4,0.2\n"
    for number, content in ((1, text), (2, "what,ever\n1,2\n")):
        (tmp_path / "metrics.csv").write_text(content)
        MetricsWriter(tmp_path, start_step=1, steps=10).close()
        assert (tmp_path / f"metrics.{number}.csv").read_text() == content
        told = capsys.readouterr().err
        assert f"metrics.csv has the columns {content.split()[0].replace(',', ', ')};" in told
        assert f"it is kept as metrics.{number}.csv" in told
        if number == 1:
            (row,) = read(tmp_path)
            assert tuple(row) == COLUMNS
            assert (row["step"], row["loss"], row["mfu"]) == ("1", "0.25", "")
    assert read(tmp_path) == []
    MetricsWriter(tmp_path, start_step=1, steps=10).close()
    assert not (tmp_path / "metrics.3.csv").exists()


@pytest.mark.parametrize("name", ["metrics.csv", "eval.csv", "tensorboard"])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    in_the_way = tmp_path / name
    in_the_way.write_text("") if name == "tensorboard" else in_the_way.mkdir()
    with pytest.raises(SaveFailed, match=f"{in_the_way}.* cannot be written: .*; there is no che"):
        MetricsWriter(tmp_path, start_step=0, steps=10)


@pytest.mark.parametrize("kind", ["datasets", "eval"])
def test_scores_are_a_row_each_and_cut_back_like_metrics(tmp_path: Path, kind: str) -> None:
    for start in (0, 1):  # the second run resumes from step 1
        writer = MetricsWriter(tmp_path, start_step=start, steps=10)
        for step in range(start + 1, 4):
            scores = {("a", "loss_token"): float(step), ("b", "loss_token"): 0.5 + start}
            writer.write_scores(kind, step, "explicit", scores)
        writer.close()
    rows = read(tmp_path, kind)
    assert tuple(rows[0]) == SCORE_COLUMNS
    assert [tuple(row.values()) for row in rows] == [
        ("1", "explicit", "a", "loss_token", "1.0"),
        ("1", "explicit", "b", "loss_token", "0.5"),
        ("2", "explicit", "a", "loss_token", "2.0"),
        ("2", "explicit", "b", "loss_token", "1.5"),
        ("3", "explicit", "a", "loss_token", "3.0"),
        ("3", "explicit", "b", "loss_token", "1.5"),
    ]
    other = "eval" if kind == "datasets" else "datasets"
    assert read(tmp_path, other) == []
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.value for e in board.Scalars(f"{kind}/b/loss_token")] == [0.5, 1.5, 1.5]


class FakeRun:
    """Remembers what Weights & Biases would be told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.step_metrics: dict[str, Any] = {}
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.step_metrics[name] = step_metric

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_gets_the_same_numbers_and_the_same_run_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    runs = [FakeRun(), FakeRun()]

    def init(**settings: Any) -> FakeRun:
        calls.append(settings)
        return runs[len(calls) - 1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for start in (0, 1):
        writer = MetricsWriter(
            tmp_path / "run", start_step=start, steps=2, wandb_project="robots", settings={"a": 1}
        )
        writer.write(start + 1, "s", {"loss": 2.0})
        writer.write_scores("eval", start + 1, "s", {("set", "position_m"): 0.01})
        writer.close()
    assert [call["project"] for call in calls] == ["robots"] * 2
    assert calls[0]["id"] == calls[1]["id"]
    assert calls[0] | {"config": {"a": 1}, "resume": "allow", "name": "run"} == calls[0]
    assert [row["step"] for run in runs for row in run.rows] == [1, 1, 2, 2]
    assert runs[0].rows == [{"step": 1, "loss": 2.0}, {"step": 1, "eval/set/position_m": 0.01}]
    assert runs[0].step_metrics["*"] == "step"
    assert all(run.finished for run in runs)


def test_weights_and_biases_is_only_needed_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    write(tmp_path, 1, 1, 1.0)
    with pytest.raises(ValueError, match=r"log\.wandb_project is 'robots', but wandb is not inst"):
        MetricsWriter(tmp_path, start_step=1, steps=2, wandb_project="robots")
