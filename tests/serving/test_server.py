"""The server over real sockets: who gets in, what each is answered, what nobody can do."""

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from lara_jax.serving import access, server
from lara_jax.serving.client import PolicyClient
from lara_jax.serving.codec import pack, unpack
from lara_jax.serving.server import PolicyServer, ServerConfig
from tests.serving.fakes import (
    FakePolicy,
    Running,
    contract,
    openpi_request,
    reference_request,
    running,
)

TOKEN = "0123456789abcdef"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@contextlib.contextmanager
def talk(run: Running, **options) -> Iterator[ClientConnection]:
    """A plain websocket, after the metadata."""
    with connect(run.url, compression=None, proxy=None, max_size=None, **options) as connection:
        assert unpack(connection.recv(timeout=20))["server"] == "lara_jax"
        yield connection


def get(run: Running, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{run.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def frame_of(message: bytes) -> bytes:
    """A client's websocket frame; a mask of zeros changes nothing."""
    return b"\x82\xff" + len(message).to_bytes(8, "big") + bytes(4) + message


def raw(run: Running) -> socket.socket:
    """A websocket of which every byte is ours, after its handshake."""
    connection = socket.create_connection(("127.0.0.1", run.port), timeout=20)
    connection.sendall(UPGRADE)
    assert connection.recv(4096).startswith(b"HTTP/1.1 101")
    return connection


def answers(good: PolicyClient) -> None:
    """A good client gets what it asks for."""
    assert good.infer(openpi_request(0.5))["actions"][0, 0] == 0.5


def counted(run: Running, line: str) -> float:
    """A value of /metrics."""
    for each in run.server.metrics.text().splitlines():
        if each.startswith(line + " "):
            return float(each.rpartition(" ")[2])
    return 0.0


def eventually(true, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_both_protocols_on_one_socket():
    with running() as run, talk(run) as connection:
        connection.send(pack(openpi_request(0.5)))
        first = unpack(connection.recv(timeout=20))
        assert first["actions"].shape == (4, 7) and first["actions"][0, 0] == 0.5
        assert set(first["server_timing"]) == {"infer_ms"}
        connection.send(pack(reference_request([0.1, 0.2, 0.3])))
        many = unpack(connection.recv(timeout=20))
        np.testing.assert_allclose(many["data"]["actions"][:, 0, 0], [0.1, 0.2, 0.3], rtol=1e-6)
        assert many["ok"] is True and many["request_id"] == "r1"
        connection.send(pack({"type": "ping"}))
        assert unpack(connection.recv(timeout=20))["type"] == "ping"
        connection.send(pack(openpi_request(0.25)))
        later = unpack(connection.recv(timeout=20))
        assert later["server_timing"]["prev_total_ms"] > 0
        assert later["server_timing"]["infer_ms"] >= later["policy_timing"]["infer_ms"] > 0
        assert counted(run, 'lara_requests_total{outcome="ok",protocol="openpi"}') == 2
        assert counted(run, 'lara_requests_total{outcome="ok",protocol="reference"}') == 2
        assert counted(run, "lara_connections") == 1
        assert counted(run, "lara_policy_seconds_count") == 5  # one observation a call


def test_what_is_no_websocket():
    with running() as run:
        assert get(run, "/healthz") == (200, "OK\n")
        status, text = get(run, "/metrics")
        assert status == 200 and "# TYPE lara_request_seconds histogram" in text
        assert get(run, "/other")[0] == 404
        assert get(run, "/")[0] == 426
        with pytest.raises(InvalidStatus, match="403"), talk(run, origin="http://evil.example"):
            pass


def test_the_token():
    with running(token=TOKEN) as run:
        assert get(run, "/healthz")[0] == 200
        assert get(run, "/metrics")[0] == 401
        assert get(run, "/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
        for header in ("", TOKEN, f"Bearer {TOKEN}x", "Bearer ", f"Basic {TOKEN}", "Bearer é"):
            shown = {"Authorization": header}
            with pytest.raises(InvalidStatus, match="401"), talk(run, additional_headers=shown):
                pass
        with talk(run, additional_headers={"Authorization": f"Api-Key {TOKEN}"}):  # as openpi's
            pass
        with PolicyClient(run.url, token=TOKEN) as good:
            answers(good)
        with pytest.raises(ValueError, match="does not let this client in: 401 a token is needed"):
            PolicyClient(run.url, token="wrong")
        assert counted(run, 'lara_connections_turned_away_total{reason="token"}') == 8


def test_errors_are_told_in_the_words_of_the_protocol():
    with running() as run, talk(run) as connection:
        for message, told in (
            (reference_request(prompt="crash"), "the policy failed; the server's log says why"),
            (reference_request(prompt="nan"), "the policy's action is not finite"),
            (reference_request(prompt="too long"), "prefix has 99 tokens"),
            (reference_request() | {"payload": {}}, "batch_images must be a list"),
        ):
            connection.send(pack(message))
            reply = unpack(connection.recv(timeout=20))
            assert reply["status"] == "error" and reply["ok"] is False
            assert reply["request_id"] == "r1" and told in reply["error"]["message"]
            assert "secret" not in str(reply) and "Traceback" not in str(reply)
        # In openpi's, a text frame, and the server closes.
        connection.send(pack(openpi_request(prompt="crash")))
        assert connection.recv(timeout=20) == "the policy failed; the server's log says why"
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011
        assert counted(run, 'lara_requests_total{outcome="failed",protocol="reference"}') == 2
        assert counted(run, 'lara_requests_total{outcome="refused",protocol="reference"}') == 2


def test_a_limited_number_of_clients():
    with running(max_connections=2) as run, talk(run):
        with talk(run):
            with pytest.raises(InvalidStatus, match="503"), talk(run):
                pass
            assert get(run, "/healthz")[0] == 200
        eventually(lambda: counted(run, "lara_connections") == 1)
        with talk(run):
            pass


def test_too_many_handshakes_are_cut_off(monkeypatch):
    monkeypatch.setattr(server, "SOCKETS", 4)
    with running() as run, PolicyClient(run.url) as good, contextlib.ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", run.port), timeout=20))
            for _ in range(8)
        ]
        for late in idle[4:]:
            with contextlib.suppress(ConnectionResetError):
                assert late.recv(1) == b""
        answers(good)


def test_a_message_that_is_too_long():
    with running(max_message_bytes=10_000) as run, PolicyClient(run.url) as good:
        with talk(run) as bad:
            bad.send(bytes(10_001))
            with pytest.raises(ConnectionClosed) as closed:
                bad.recv(timeout=20)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        with pytest.raises(ValueError, match="bytes; the server takes 10000"):
            good.infer(openpi_request() | {"x": np.zeros(10_000, np.uint8)})
        answers(good)


def test_who_stalls_is_closed_and_nobody_waits_for_it(monkeypatch):
    monkeypatch.setattr(server, "CLOSE_SECONDS", 0.5)
    limits = {"handshake_seconds": 0.5, "idle_seconds": 1.0, "send_seconds": 0.5}
    long = contract(action_horizon=20_000)  # 64 chunks of it are 36 MB
    with running(FakePolicy(horizon=20_000), contract=long, **limits) as run:
        half = socket.create_connection(("127.0.0.1", run.port), timeout=20)
        half.sendall(UPGRADE[:40])  # never finishes its handshake
        slow = raw(run)
        slow.sendall(frame_of(pack(openpi_request()))[:100])  # nor its message
        deaf = raw(run)
        deaf.sendall(frame_of(pack(reference_request([0.1] * 64))))  # takes in no reply
        with PolicyClient(run.url, timeout_seconds=20) as good:
            answers(good)
        assert half.recv(100) == b""
        with contextlib.suppress(ConnectionResetError):
            while slow.recv(4096):
                pass
        eventually(lambda: counted(run, 'lara_connections_turned_away_total{reason="idle"}') >= 1)
        away = 'lara_connections_turned_away_total{reason="stalled"}'
        eventually(lambda: counted(run, away) == 1)
        eventually(lambda: counted(run, "lara_connections") == 0)
        for each in (half, slow, deaf):
            each.close()


def test_who_floods_waits_like_everybody():
    with running(FakePolicy(seconds=0.002)) as run, PolicyClient(run.url) as good:
        bad, stop = raw(run), threading.Event()
        bad.settimeout(0.5)

        def flood() -> None:
            request = frame_of(pack(reference_request([0.1] * 64)))
            while not stop.is_set():
                try:
                    bad.sendall(request)  # and never reads
                except (TimeoutError, OSError):
                    return

        flooding = threading.Thread(target=flood, daemon=True)
        flooding.start()
        for _ in range(10):
            answers(good)
        stop.set()
        flooding.join(20)
        bad.close()
        calls = run.policy.calls
        assert len(calls) >= 20  # the flood was served in between


def test_who_leaves_is_not_acted_for():
    policy = FakePolicy(seconds=0.3)
    with running(policy) as run, PolicyClient(run.url) as good:
        bad = [raw(run) for _ in range(3)]
        for each in bad:
            each.sendall(frame_of(pack(reference_request([0.1] * 64, prompt="gone"))))
        eventually(lambda: len(policy.calls) >= 1)
        for each in bad:
            each.close()
        eventually(lambda: counted(run, "lara_connections") == 1)
        before = len(policy.calls)
        answers(good)
        assert policy.calls[before + 1 :] in ([], [["go"]])
        assert policy.calls[-1] == ["go"]


def test_clients_are_batched_together():
    policy = FakePolicy(seconds=0.05)
    with running(policy, batch_size=4, batch_wait_seconds=1.0) as run:
        results: dict[int, float] = {}

        def client(number: int) -> None:
            with PolicyClient(run.url, timeout_seconds=30) as mine:
                for _ in range(5):
                    value = mine.infer(openpi_request(number / 8))["actions"][0, 0]
                    assert value == number / 8
                results[number] = value

        clients = [threading.Thread(target=client, args=(n,)) for n in range(4)]
        for each in clients:
            each.start()
        for each in clients:
            each.join(60)
        assert results == {n: n / 8 for n in range(4)}
        assert len(policy.calls) < 20 and {len(call) for call in policy.calls} == {4}


def test_tls(tmp_path: Path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x"
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *options.split(), *names, *files], check=True, capture_output=True)
    with running(tls=access.tls_context(certificate, key)) as run:
        url = run.url.replace("ws://", "wss://")
        with PolicyClient(url, ca_file=certificate) as good:
            answers(good)
        with pytest.raises(ValueError, match="is not to be trusted"):
            PolicyClient(url)
        with pytest.raises(ConnectionError, match="no answer from the policy server"):
            PolicyClient(run.url, timeout_seconds=0.5)
    with pytest.raises(ValueError, match="no certificate and its key"):
        access.tls_context(key, certificate)
    context = access.tls_context(certificate, key)
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_stopping_closes_the_connections():
    with contextlib.ExitStack() as stack:
        with running() as run:
            connection = stack.enter_context(talk(run))
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=20)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1001


def test_warm_start_finds_a_policy_that_breaks_its_contract():
    policy = FakePolicy()
    PolicyServer(policy, contract(), ServerConfig(batch_size=3)).warm()
    assert policy.calls == [["", "", ""]]
    with pytest.raises(ValueError, match=r"answered \[1, 4, 7\], expected \[1, 5, 7\]"):
        PolicyServer(policy, contract(action_horizon=5), ServerConfig()).warm()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_connections": 257}, r"max_connections is 257; allowed 1\.\.256"),
        ({"idle_seconds": 0}, "idle_seconds must be above 0"),
        ({"batch_wait_seconds": -1}, "batch_wait_seconds"),
    ],
)
def test_bounds_are_checked(change, told):
    with pytest.raises(ValueError, match=told):
        ServerConfig(**change)


def test_a_line_that_breaks_ends_the_server(monkeypatch):
    """Rather than leaving it up and mute."""

    def broken(self, rows: int, seconds: float) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(server.Metrics, "called", broken)

    async def main() -> None:
        served = PolicyServer(FakePolicy(), contract(), ServerConfig())
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            url = f"ws://127.0.0.1:{bound.getsockname()[1]}"

            def ask() -> None:
                with contextlib.suppress(ConnectionError):
                    PolicyClient(url, timeout_seconds=1).infer(openpi_request())

            asking = threading.Thread(target=ask, daemon=True)
            async with asyncio.timeout(20):
                await served.run(bound, asyncio.Event(), ready=asking.start)
            await asyncio.to_thread(asking.join, 20)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())
