"""When a run is asked to stop: SIGTERM, or a cloud's notice that it takes the machine away.

Everything becomes a SIGTERM of this process, and that becomes a question of the training loop:

    SIGTERM -------------------+--> one process: a flag
    metadata server: preempted |
      or maintenance, --------/ --> several: JAX's preemption service, which makes all processes
      looked at every second        stop after the same step (`reached_preemption_sync_point`)

Either way the step that runs is finished, a checkpoint is saved and the run ends.

Source: Google Cloud, "Compute Engine metadata": `instance/preempted` is TRUE for 30 s before a spot
machine stops, and `instance/maintenance-event` is not NONE before one that is stopped for
maintenance. GCE_METADATA_HOST is how Google's own libraries name another server.
"""

import contextlib
import http.client
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

QUIET = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
# Live migration leaves the machine running.
HARMLESS = ("MIGRATE_ON_HOST_MAINTENANCE",)
POLL_SECONDS = 1.0
TIMEOUT_SECONDS = 2.0
# What a server raises that is away, or breaks off in the middle of an answer.
SILENT = (OSError, http.client.HTTPException)


@contextlib.contextmanager
def stop_requests(notice: str = "sigterm") -> Iterator[Callable[[int], bool]]:
    """Inside, SIGTERM does not end the process; yields whether a run stops after a step.

    Args:
      notice: "sigterm", or "gce" to look at the metadata server of a Google Cloud machine besides.

    Yields:
      A function of the number of steps done, to be called after each step by every process.

    Raises:
      ValueError: there is no metadata server.
    """
    with contextlib.ExitStack() as stack:
        if jax.distributed.is_initialized():
            # JAX has its own handler of SIGTERM in place; another one would hide the signal.
            asked: Callable[[int], bool] = multihost_utils.reached_preemption_sync_point
        else:
            asked = stack.enter_context(_flag())
        if notice == "gce":
            stack.enter_context(_gce_notices())
        yield asked


@contextlib.contextmanager
def _flag() -> Iterator[Callable[[int], bool]]:
    """Inside, SIGTERM only sets a flag; yields the function that reads it."""
    flags: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: flags.append(number))
    try:
        yield lambda step: bool(flags)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _gce_notices() -> Iterator[None]:
    """Inside, a thread looks at the metadata server and sends this process one SIGTERM."""
    try:
        _gce_notice()
    except SILENT as error:
        raise ValueError(
            f"checkpoint.preemption_notice is 'gce', but no metadata server answers ({error}); "
            "allowed elsewhere: 'sigterm'"
        ) from error
    end = threading.Event()

    def watch() -> None:
        watching = True
        try:
            notice = _first_notice(end)
            watching = False
        finally:
            if watching:  # what ended it follows, as of any thread
                _say("the metadata server is not asked any more: the run hears of SIGTERM alone")
        if notice:
            _say(f"the machine will be taken away ({notice}): saving, then stopping")
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch, name="preemption notices", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _first_notice(end: threading.Event) -> str:
    """Asks the metadata server until it says something; empty if `end` came first."""
    answers = True
    while not end.wait(POLL_SECONDS):
        try:
            if notice := _gce_notice():
                return notice
            answers = True
        except SILENT as error:
            if answers:
                _say(
                    f"the metadata server does not answer ({type(error).__name__}: {error}); "
                    "asking on"
                )
            answers = False
    return ""


def _gce_notice() -> str:
    """What the metadata server says of this machine's end; empty while it says nothing."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    for key, quiet in QUIET.items():
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/{key}", headers={"Metadata-Flavor": "Google"}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            value = answer.read().decode(errors="replace").strip()
        if value != quiet and value not in HARMLESS:
            return f"{key} is {value}"
    return ""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
