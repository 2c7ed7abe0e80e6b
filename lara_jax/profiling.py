"""Traces of single steps with JAX's profiler, planned or asked for while a run goes on.

    log.profile_steps = (100, 104)    steps 100 to 104
    kill -USR1 PID                    the next log.profile_signal_steps steps

A trace lies in DIR/profile and opens in TensorBoard's profile plugin, XProf or Perfetto.
"""

import contextlib
import signal
import threading
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Starts and ends traces between steps.

    Args:
      folder: where traces go.
      steps: (first, last) to trace, counted from 1; () for none.
      signal_steps: how many to trace on SIGUSR1. A process that does not run in its main thread
        cannot be asked.
    """

    def __init__(self, folder: Path, *, steps: tuple[int, ...] = (), signal_steps: int = 5) -> None:
        self._folder, self._signal_steps = folder, signal_steps
        self._planned = range(steps[0], steps[1] + 1) if steps else range(0)
        self._last: int | None = None
        self._asked = threading.Event()
        self._undo = contextlib.ExitStack()
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGUSR1, lambda *_: self._asked.set())
            self._undo.callback(signal.signal, signal.SIGUSR1, before)

    def at(self, step: int, done: Any) -> None:
        """Call before each step.

        Args:
          step: the number of the step that comes next, counted from 1.
          done: arrays of the step before, which a trace waits for at either end.
        """
        if self._last is not None and step > self._last:
            self._stop(done)
        if self._last is None and (self._asked.is_set() or step in self._planned):
            planned = step in self._planned
            self._last = self._planned[-1] if planned else step + self._signal_steps - 1
            self._asked.clear()
            jax.block_until_ready(done)
            jax.profiler.start_trace(str(self._folder))

    def close(self, done: Any = None) -> None:
        """Ends a trace that still runs, and lets SIGUSR1 be what it was."""
        if self._last is not None:
            self._stop(done)
        self._undo.close()

    def _stop(self, done: Any) -> None:
        jax.block_until_ready(done)
        jax.profiler.stop_trace()
        self._last = None
