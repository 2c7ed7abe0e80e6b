"""A run's numbers: CSV files, TensorBoard, Weights & Biases where it is asked for, a progress bar.

    metrics.csv    a row for each logged step, always with the same columns
    datasets.csv   the losses of each dataset's rows: step, stage, dataset, metric, value
    eval.csv       held-out evaluation, in the same form

What a stage or a machine does not have stays empty. A run that resumes from step n first drops the
rows after n (an interrupted run may have logged further than it saved), so no step appears twice
and a file reads as if nothing had happened. A file that another version wrote with other columns is
kept as `metrics.1.csv`, and its rows go on with the columns of now.
"""

import contextlib
import csv
import importlib
import itertools
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from lara_jax.checkpoint_files import writing

COLUMNS = (
    "step",
    "stage",
    "loss",
    "loss_token",
    "loss_visual",
    "loss_action",
    "gradient_norm",
    "skipped",
    "rate_backbone",
    "rate_expert",
    "samples_per_second",
    "data_wait_fraction",
    "mfu",
    "device_memory_gb",
)
SCORE_COLUMNS = ("step", "stage", "dataset", "metric", "value")
# Measured by each process for itself: two would not agree on which checkpoint is the best.
MEASURED = ("samples_per_second", "data_wait_fraction", "mfu", "device_memory_gb")
# What the progress bar shows: column -> its name there.
SHOWN = {
    "loss": "loss",
    "samples_per_second": "samples/s",
    "data_wait_fraction": "data wait",
    "mfu": "MFU",
    "device_memory_gb": "GB",
}
# One number of a dataset, by (dataset, metric).
Scores = Mapping[tuple[str, str], float]


class CsvTable:
    """A file of rows by step that can be cut back to an earlier step.

    Args:
      path: the file; made where it is missing.
      columns: its header; "step" is one of them.
      start_step: rows after it are dropped.

    Raises:
      SaveFailed: the file cannot be written.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, start_step: int) -> None:
        self._path = path
        rows = _rows(path, columns, start_step) if path.is_file() else []
        with writing(path, path.parent):
            rewritten = path.with_suffix(".csv.new")
            with rewritten.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            rewritten.replace(path)
            self._file = path.open("a", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, columns, lineterminator="\n")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows; a column that is left out stays empty, one that is not there is refused.

        Raises:
          SaveFailed: the file cannot be written.
        """
        with writing(self._path, self._path.parent):
            self._csv.writerows(rows)
            self._file.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
          SaveFailed: what was written before is not on the disk.
        """
        with writing(self._path, self._path.parent):
            self._file.close()


class Board:
    """A file of events for TensorBoard, whose own writer fails in a thread, where none can tell.

    Args:
      workdir: the run's directory; the file goes to its folder `tensorboard`.

    Raises:
      SaveFailed: the file cannot be written.
    """

    def __init__(self, workdir: Path) -> None:
        self._workdir, folder = workdir, workdir / "tensorboard"
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        with writing(self._path, workdir):
            folder.mkdir(exist_ok=True)
            self._file = self._path.open("wb")
        self._records = RecordWriter(self._file)
        self.add(0, file_version="brain.Event:2")

    def add(self, step: int, **content: Any) -> None:
        """Writes an event of a step.

        Raises:
          SaveFailed: the file cannot be written.
        """
        event = Event(wall_time=time.time(), step=step, **content)
        with writing(self._path, self._workdir):
            self._records.write(event.SerializeToString())
            self._records.flush()

    def close(self) -> None:
        """Closes the file.

        Raises:
          SaveFailed: what was written before is not on the disk.
        """
        with writing(self._path, self._workdir):
            self._file.close()


class MetricsWriter:
    """Writes the numbers of one run.

    Args:
      workdir: the run's directory.
      start_step: steps done; rows after it are dropped.
      steps: of the whole run.
      wandb_project: project of Weights & Biases to send them to, too; empty for none.
      settings: of the run, for Weights & Biases to show.

    Raises:
      ValueError: `wandb` is not installed but asked for.
      SaveFailed: a file cannot be written; so do the methods.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        start_step: int,
        steps: int,
        wandb_project: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:

            def table(name: str, columns: Sequence[str]) -> CsvTable:
                made = CsvTable(workdir / f"{name}.csv", columns, start_step=start_step)
                return opened.enter_context(contextlib.closing(made))

            self._metrics = table("metrics", COLUMNS)
            self._scores = {kind: table(kind, SCORE_COLUMNS) for kind in ("datasets", "eval")}
            self._wandb = _wandb_run(wandb_project, workdir, settings) if wandb_project else None
            if self._wandb is not None:
                opened.callback(self._wandb.finish)
            self._board = opened.enter_context(contextlib.closing(Board(workdir)))
            # What earlier files say of the steps from here on is void.
            self._board.add(start_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._bar = tqdm(total=steps, initial=start_step, unit="step", file=sys.stderr)
            opened.callback(self._bar.close)
            self._opened = opened.pop_all()

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        self._bar.update()

    def write(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Logs the metrics of one step.

        Args:
          step: steps done, the first being 1.
          stage: name of its stage.
          values: metrics by column.

        Raises:
          ValueError: for a metric that is not among `COLUMNS`.
        """
        self._metrics.write([{"step": step, "stage": stage, **values}])
        self._publish(step, values)
        shown = {
            name: f"{values[column]:.4g}" for column, name in SHOWN.items() if column in values
        }
        self._bar.set_description(stage, refresh=False)
        self._bar.set_postfix(shown)

    def write_scores(self, kind: str, step: int, stage: str, scores: Scores) -> None:
        """Logs numbers of datasets: a row each, TensorBoard tags "kind/dataset/metric".

        Args:
          kind: "datasets" (losses of the training stream) or "eval".
          step: steps done.
          stage: name of its stage.
          scores: by dataset and metric.
        """
        rows = [
            dict(zip(SCORE_COLUMNS, (step, stage, dataset, metric, value), strict=True))
            for (dataset, metric), value in scores.items()
        ]
        self._scores[kind].write(rows)
        self._publish(step, {"/".join((kind, *name)): value for name, value in scores.items()})

    def close(self) -> None:
        """Closes files and progress bar."""
        self._opened.close()

    def _publish(self, step: int, values: Mapping[str, float]) -> None:
        """To TensorBoard and Weights & Biases."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._board.add(step, summary=Summary(value=scalars))
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})


def _rows(path: Path, columns: Sequence[str], start_step: int) -> list[dict[str, str]]:
    """The rows up to a step of a file that is there; one with other columns is kept besides."""
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        whole = [row for row in reader if None not in row.values()]  # not cut off by a kill
    found = tuple(reader.fieldnames or columns)
    if found != tuple(columns):
        copies = (path.with_suffix(f".{number}.csv") for number in itertools.count(1))
        copy = next(copy for copy in copies if not copy.exists())
        with writing(copy, path.parent):
            shutil.copyfile(path, copy)
        print(
            f"{path} has the columns {', '.join(found)}; it is kept as {copy.name}, and goes on "
            f"with {', '.join(columns)}",
            file=sys.stderr,
        )
    rows = [row for row in whole if row.get("step") and int(row["step"]) <= start_step]
    return [{name: row.get(name, "") for name in columns} for row in rows]


def _wandb_run(project: str, workdir: Path, settings: Mapping[str, Any] | None) -> Any:
    """The run of Weights & Biases, the same one whenever the directory's run resumes."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"config.log.wandb_project is {project!r}, but wandb is not installed: "
            "`pip install wandb`, or leave the project empty"
        ) from error
    identity = workdir / "wandb_id"
    if not identity.is_file():
        identity.write_text(secrets.token_hex(8))
    run = wandb.init(
        project=project,
        id=identity.read_text(),
        name=workdir.absolute().name,
        dir=str(workdir),
        config=dict(settings or {}),
        resume="allow",
    )
    # Our steps, not its own count of calls, which would refuse the steps that a resume repeats.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
