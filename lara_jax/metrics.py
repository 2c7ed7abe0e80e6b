"""A run's numbers: a CSV file, TensorBoard and a progress bar.

`DIR/metrics.csv` has one row for each logged step, always with the same columns. A run that resumes
from step n first drops the rows after n (an interrupted run may have logged further than it saved),
so no step appears twice and the file reads as if nothing had happened.
"""

import csv
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tqdm import tqdm

COLUMNS = (
    "step",
    "stage",
    "loss",
    "loss_token",
    "loss_visual",
    "loss_action",
    "gradient_norm",
    "rate_backbone",
    "rate_expert",
    "samples_per_second",
)


class MetricsWriter:
    """Writes the metrics of one run. Losses that a stage does not have stay empty.

    Args:
      workdir: the run's directory.
      start_step: steps done; rows after it are dropped.
      steps: of the whole run.
    """

    def __init__(self, workdir: str | Path, *, start_step: int, steps: int) -> None:
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.csv"
        self._drop_rows_after(start_step)
        self._file = self._path.open("a", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._board = EventFileWriter(str(workdir / "tensorboard"))
        # What earlier files say of the steps from here on is void.
        restart = SessionLog(status=SessionLog.START)
        self._add_event(start_step + 1, session_log=restart)
        self._bar = tqdm(total=steps, initial=start_step, unit="step", file=sys.stderr)

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
        row = {"step": step, "stage": stage, **values}
        self._csv.writerow(row)
        self._file.flush()
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add_event(step, summary=Summary(value=scalars))
        shown = {"loss": values["loss"], "samples/s": values["samples_per_second"]}
        self._bar.set_description(stage, refresh=False)
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})

    def close(self) -> None:
        """Closes files and progress bar."""
        self._bar.close()
        self._board.close()
        self._file.close()

    def _add_event(self, step: int, **content: Any) -> None:
        self._board.add_event(Event(wall_time=time.time(), step=step, **content))

    def _drop_rows_after(self, last_step: int) -> None:
        """Rewrites the file, in one go, with the header and the rows that count."""
        rows = []
        if self._path.is_file():
            with self._path.open(newline="", encoding="utf-8") as stream:
                reader = csv.DictReader(stream)
                whole = (row for row in reader if None not in row.values())  # not cut off by a kill
                rows = [row for row in whole if int(row["step"]) <= last_step]
            if tuple(reader.fieldnames or COLUMNS) != COLUMNS:
                raise ValueError(f"{self._path} has the columns {reader.fieldnames}, not {COLUMNS}")
        rewritten = self._path.with_suffix(".csv.new")
        with rewritten.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        rewritten.replace(self._path)


def check_finite(step: int, values: Mapping[str, float], sample_ids: np.ndarray) -> None:
    """Stops a run whose numbers are no numbers.

    Raises:
      FloatingPointError: with the step, the metrics and the samples of the batch.
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        raise FloatingPointError(
            f"step {step}: {', '.join(f'{name} = {value}' for name, value in bad.items())}; "
            f"samples {np.asarray(sample_ids).tolist()}"
        )
