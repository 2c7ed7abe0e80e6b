"""Event files: read back with another project's protocol buffers."""

import time
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.rlds.tfrecord import TFRecordFile
from lara_jax.event_file import EventFile

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


def test_scalars_come_back(tmp_path: Path) -> None:
    written = {
        1: {"loss": 2.5, "rate/backbone": 1e-5},
        300: {"loss": float("inf")},
        2**40: {"loss": -1.0},
    }
    file = EventFile(tmp_path / "board", first_step=1)
    for step, values in written.items():
        file.scalars(step, values)
    file.close()

    records = TFRecordFile(file.path)
    head, start, *events = [
        event_pb2.Event.FromString(records.read(index)) for index in range(len(records))
    ]
    assert head.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (1, event_pb2.SessionLog.START)
    found = {
        event.step: {value.tag: value.simple_value for value in event.summary.value}
        for event in events
    }
    assert found == {
        step: {tag: float(np.float32(value)) for tag, value in values.items()}
        for step, values in written.items()
    }
    assert abs(events[-1].wall_time - time.time()) < 60


def test_a_run_that_dies_leaves_whole_records(tmp_path: Path) -> None:
    file = EventFile(tmp_path, first_step=7)
    file.scalars(7, {"loss": 1.0})
    assert len(TFRecordFile(file.path)) == 3  # not closed
