"""Traces: of the steps that were planned, and of the next ones when a signal asks."""

import os
import signal
from pathlib import Path

import jax.numpy as jnp
import pytest

from lara_jax import profiling
from lara_jax.config import EvalConfig, LogConfig
from lara_jax.profiling import Profiler


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was started and stopped, instead of a real trace, which takes seconds."""
    calls: list[str] = []
    profiler = profiling.jax.profiler
    monkeypatch.setattr(profiler, "start_trace", lambda folder: calls.append(f"start {folder}"))
    monkeypatch.setattr(profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def run(profiler: Profiler, traced: list[str], *, first: int, last: int) -> list[int]:
    """Steps that lie inside a trace."""
    inside = []
    for step in range(first, last + 1):
        profiler.at(step, jnp.zeros(()))
        if len(traced) % 2:
            inside.append(step)
    profiler.close()
    return inside


def test_planned_steps_are_traced_once(traced: list[str], tmp_path: Path) -> None:
    assert run(Profiler(tmp_path, steps=(3, 4)), traced, first=1, last=8) == [3, 4]
    assert traced == [f"start {tmp_path}", "stop"]


def test_a_run_that_resumes_or_ends_within_them_traces_the_rest(
    traced: list[str], tmp_path: Path
) -> None:
    assert run(Profiler(tmp_path, steps=(3, 6)), traced, first=5, last=9) == [5, 6]
    assert run(Profiler(tmp_path, steps=(3, 6)), traced, first=1, last=4) == [3, 4]
    assert traced[-1] == "stop"


def test_a_signal_asks_for_the_next_steps(traced: list[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    profiler = Profiler(tmp_path, signal_steps=2)
    profiler.at(1, None)
    assert traced == []
    os.kill(os.getpid(), signal.SIGUSR1)
    assert run(profiler, traced, first=2, last=6) == [2, 3]
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("steps", [(5,), (4, 3), (0, 2), (1, 2, 3)])
def test_steps_that_make_no_sense_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="profile_steps must be"):
        LogConfig(profile_steps=steps)
    with pytest.raises(ValueError, match="batches must be at least 1"):
        EvalConfig(batches=0)


@pytest.mark.slow
def test_a_trace_is_written(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, steps=(1, 1))
    profiler.at(1, None)
    done = jnp.ones(3) + 1
    profiler.at(2, done)
    profiler.close(done)
    assert list(tmp_path.rglob("*.xplane.pb"))
