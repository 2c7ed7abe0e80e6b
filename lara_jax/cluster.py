"""A run over several processes: how they find each other, and how none is left waiting.

`lara train` is started once on every host, and joins the others by itself:

    TPU pods, slices, GKE, SLURM, Open MPI    JAX finds coordinator, number and id of the process
    launch/local.py                           the three variables below say so
    a machine on its own                      nothing happens

Processes compute in step, so one that is gone leaves the others waiting for it. Who notices:

    gone, or stopped        JAX's coordination service misses its heartbeats: it aborts the others,
                            with a line that names the process, `HEARTBEAT_SECONDS` later
    failed                  it says so with its number and ends (`Membership`), without waiting for
                            the others as JAX would at the end of a process; then as above
    alive, but its devices  `Watch`: no step has finished for `train.hang_seconds`
    never finish a step

So all of them end, and what has started them starts them again: they go on from the newest
checkpoint. Only the first process tells how the run goes on; errors are told by each.

Source: JAX, `jax.distributed.initialize` and `jax/_src/clusters`.
"""

import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from collections import deque
from types import TracebackType
from typing import Any

import jax
from jax._src.clusters import ClusterEnv

from lara_jax import cli

# JAX reads the first by itself, and has no variables for the other two.
ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "LARA_PROCESS_COUNT", "LARA_PROCESS_ID"
HEARTBEAT_SECONDS = 30
# What a process that has failed may still take to close its files.
CLOSING_SECONDS = 15.0
# How the message of an error in a running program begins: a code of absl::Status.
DEVICE_ERROR = re.compile(
    "(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|ABORTED|INTERNAL|UNAVAILABLE|DATA_LOSS): "
)


def join() -> None:
    """Makes this process one of its cluster, where there is one; before anything asks for devices.

    Raises:
      ValueError: the cluster's settings are wrong.
    """
    found = _as_told()
    if found is not None:
        # All is said: JAX need not look for a cluster, in whose job this may run on one machine.
        jax.distributed.initialize(
            *found,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    elif os.environ.get(ADDRESS) or _is_found():
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
        except ValueError as error:
            given = f"{ADDRESS} is {os.environ.get(ADDRESS, '')!r}; {COUNT} and {NUMBER} are empty"
            raise ValueError(f"this process cannot join its cluster: {error} ({given})") from error
    if jax.distributed.is_initialized():
        say(f"{jax.process_count()} processes, {jax.device_count()} devices")


def say(line: str) -> None:
    """Tells how the run goes on, on standard error: only the first process does."""
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


class Membership:
    """Inside, an error ends this process when it is one of several, by itself.

    At the usual end of a process JAX waits for the others, who may be waiting for this one.

    Args:
      seconds: that it may still take.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds

    def __enter__(self) -> "Membership":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit) or not jax.distributed.is_initialized():
            return
        if self._seconds:
            timer = threading.Timer(self._seconds, _end, [error])
            timer.daemon = True
            timer.start()
        else:
            _end(error)


class Watch(Membership):
    """Inside, a thread ends the process when the devices finish no step for too long.

    The clock runs while a step that is handed to the devices is not finished, so neither what is
    compiled, read, evaluated or saved between two steps counts: only a step, and the wait for the
    slowest process in it. Devices may run a step while it is handed to them (CPU devices with
    others to wait for do); but the first step of a program is compiled there.

    Args:
      hang_seconds: that a step may take; 0 for no limit.
      step: steps done.
    """

    def __init__(self, hang_seconds: float, step: int) -> None:
        super().__init__(CLOSING_SECONDS)
        self._hang_seconds, self._last = hang_seconds, step
        self._steps: deque[tuple[int, Any]] = deque()
        self._compiled = self._handing = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steps", daemon=True)

    def __enter__(self) -> "Watch":
        if self._hang_seconds:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop.set()
        super().__exit__(kind, error, _)

    def new_program(self) -> None:
        """The next step compiles."""
        self._compiled = False

    def handing(self) -> None:
        """A step is about to be handed to the devices."""
        self._handing = self._compiled

    def handed(self, step: int, result: jax.Array) -> None:
        """A step was handed to the devices.

        Args:
          step: its number, the first being 1.
          result: something that is there when the step is finished; it must not be donated.
        """
        if self._hang_seconds:
            self._steps.append((step, result))
        self._compiled, self._handing = True, False

    def _run(self) -> None:
        since = time.monotonic()
        while not self._stop.wait(min(1.0, self._hang_seconds / 10)):
            waiting = self._handing or bool(self._steps)
            while self._steps and self._steps[0][1].is_ready():
                self._last = self._steps.popleft()[0]
                waiting = False
            now = time.monotonic()
            since = since if waiting else now
            if now - since > self._hang_seconds:
                _tell(
                    f"no step has finished for {self._hang_seconds:g} s "
                    f"(config.train.hang_seconds); the last one was step {self._last}. This "
                    "process ends; the run goes on from its newest checkpoint when it is started "
                    "again"
                )
                faulthandler.dump_traceback(sys.stderr)
                os._exit(1)


def _as_told() -> tuple[str, int, int] | None:
    """What the three variables say; None where they do not.

    Raises:
      ValueError: they are incomplete or wrong.
    """
    values = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, NUMBER)}
    if not values[COUNT] and not values[NUMBER]:
        return None
    given = ", ".join(f"{name}={value!r}" for name, value in values.items())
    host, _, port = values[ADDRESS].rpartition(":")
    count, number = values[COUNT], values[NUMBER]
    if not (host and all(text.isdecimal() for text in (port, count, number))):
        raise ValueError(f"the processes' variables are {given}; allowed: HOST:PORT, N, 0 to N - 1")
    if not int(number) < int(count):
        raise ValueError(f"{NUMBER} is {number}; allowed: 0 to {COUNT} - 1, {int(count) - 1}")
    return values[ADDRESS], int(count), int(number)


def _is_found() -> bool:
    """Whether JAX finds a cluster of more than one process."""
    # The very environments that `jax.distributed.initialize` goes through; it has no way to ask.
    known = [env for env in ClusterEnv._cluster_types if not env.opt_in_only_method]
    present = next((env for env in known if env.is_env_present()), None)
    try:
        return present is not None and present.get_process_count() > 1
    except ValueError as error:
        raise ValueError(f"the cluster's settings ({present}) are wrong: {error}") from error


def _end(error: BaseException) -> None:
    """Tells the error, and ends the process without waiting for the others."""
    of_devices = isinstance(error, jax.errors.JaxRuntimeError) or (
        # JAX raises some of these as ValueErrors; but they are no wrong call.
        isinstance(error, ValueError) and DEVICE_ERROR.match(str(error)) is not None
    )
    status = None if of_devices else cli.exit_status(error)
    if status is None:
        traceback.print_exception(error)
    hint = "; is another process gone?" if of_devices else ""
    _tell(f"{type(error).__name__}: {' '.join(str(error).split())}{hint}")
    sys.stdout.flush()
    os._exit(1 if status is None else status)


def _tell(line: str) -> None:
    where = ""
    if jax.distributed.is_initialized():
        where = f"process {jax.process_index()} of {jax.process_count()}: "
    print(f"lara train: {where}{line}", file=sys.stderr, flush=True)
