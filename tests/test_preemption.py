"""Asked to stop: by a signal, by the cloud, and all processes after the same step."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import BadStatusLine, IncompleteRead
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from lara_jax import preemption
from lara_jax.preemption import stop_requests

PREEMPTED = "/computeMetadata/v1/instance/preempted"
MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"


def wait_for(asked: Callable[[int], bool], seconds: float) -> bool:
    """Whether it is true within so many seconds."""
    end = time.monotonic() + seconds
    while not asked(0) and time.monotonic() < end:
        time.sleep(0.01)
    return asked(0)


def test_a_signal_is_a_question_inside_and_a_signal_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as asked:
        assert not asked(3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert wait_for(asked, 5)
        os.kill(os.getpid(), signal.SIGTERM)  # again: nothing happens
        assert asked(4)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A metadata server of this machine, and what it says."""
    says = {PREEMPTED: "FALSE", MAINTENANCE: "NONE"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path in says and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 403)
            self.end_headers()
            self.wfile.write(says.get(self.path, "").encode())

        def log_message(self, *args: object) -> None:
            """Says nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.02)
    yield says
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "value", "stops"),
    [
        (PREEMPTED, "TRUE", True),
        (MAINTENANCE, "TERMINATE_ON_HOST_MAINTENANCE", True),
        (MAINTENANCE, "MIGRATE_ON_HOST_MAINTENANCE", False),
    ],
)
def test_the_clouds_notice_is_a_request_to_stop(
    metadata: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    path: str,
    value: str,
    stops: bool,
) -> None:
    with stop_requests("gce") as asked:
        assert not wait_for(asked, 0.1)
        metadata[path] = value
        assert wait_for(asked, 10 if stops else 0.2) is stops
    told = capsys.readouterr().err
    assert (f"will be taken away ({path.partition('v1/')[2]} is {value})" in told) is stops


def test_a_server_that_falls_silent_is_asked_on(
    metadata: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with stop_requests("gce") as asked:
        silent = metadata.pop(PREEMPTED)
        assert not wait_for(asked, 0.2)
        metadata[PREEMPTED] = silent
        metadata[MAINTENANCE] = "TERMINATE_ON_HOST_MAINTENANCE"
        assert wait_for(asked, 10)
    assert capsys.readouterr().err.count("the metadata server does not answer") == 1


def test_a_server_that_breaks_off_is_asked_on(
    metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half an answer, or none that is HTTP, does not end the watch."""
    real, errors = preemption._gce_notice, [BadStatusLine("?"), IncompleteRead(b"FA")]
    with stop_requests("gce") as asked:
        monkeypatch.setattr(preemption, "_gce_notice", lambda: raise_next(errors) or real())
        assert not wait_for(asked, 0.2)
        assert errors == []
        metadata[PREEMPTED] = "TRUE"
        assert wait_for(asked, 10)
    told = capsys.readouterr().err
    assert "does not answer (BadStatusLine: ?); asking on" in told


def raise_next(errors: list[Exception]) -> None:
    if errors:
        raise errors.pop(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_watch_that_ends_is_said(
    metadata: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stop_requests("gce") as asked, monkeypatch.context() as trouble:
        trouble.setattr(preemption, "_gce_notice", lambda: raise_next([KeyError("ours")]))
        assert not wait_for(asked, 0.2)
    assert "the metadata server is not asked any more" in capsys.readouterr().err
    with stop_requests("gce"):
        pass
    assert "not asked any more" not in capsys.readouterr().err


def test_notices_need_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    with (
        pytest.raises(ValueError, match="preemption_notice is 'gce', but no metadata server"),
        stop_requests("gce"),
    ):
        pass


PROCESS = """
import sys, time
import jax
from lara_jax.preemption import stop_requests

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with stop_requests() as asked:
    print("ready", flush=True)
    for step in range(1, 2000):
        time.sleep(0.01)
        if asked(step):
            break
    print(step, flush=True)
"""


def test_several_processes_stop_after_the_same_step(repository: Path) -> None:
    """One of them gets the signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number)],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (int(out) for out, _ in outputs)
    assert first == second < 1999
