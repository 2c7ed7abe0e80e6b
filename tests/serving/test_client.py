"""The client: asks as the policy is asked, finds a lost server again, and gives up in time."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lara_jax.serving.cli import listener
from lara_jax.serving.client import PolicyClient
from lara_jax.serving.codec import Refused
from tests.serving.fakes import FakePolicy, contract, frame, openpi_request, running


def observation(state: float, **changes) -> dict:
    seen = {"primary": frame(), "wrist": None, "state": np.full(3, state), "instruction": "go"}
    return seen | changes


@pytest.mark.parametrize("module", ["client", "server"])
def test_needs_neither_jax_nor_another_framework(module: str, repository: Path):
    code = f"import sys, lara_jax.serving.{module}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "numpy" in loaded
    assert not loaded & {"jax", "flax", "torch", "tensorflow", "scipy", "ml_collections", "PIL"}


def test_asks_as_the_policy_is_asked():
    policy = FakePolicy()
    with running(policy) as run, PolicyClient(run.url) as client:
        assert client.views == ("primary", "wrist") and client.latent_slots == 3
        assert client.metadata["action_chunk_size"] == 4
        seen = [observation(0.1), observation(0.2, primary=frame(51)), observation(0.3)]
        chunks = client(seen)
        assert chunks.dtype == np.float32
        np.testing.assert_array_equal(
            chunks, policy([{**s, "state": np.float32(s["state"])} for s in seen])
        )
        np.testing.assert_allclose(chunks[:, 0, 0], [0.1, 0.04, 0.3], rtol=1e-6)
        with pytest.raises(Refused, match="the policy server says: view 'primary' is"):
            client([observation(0.1, primary=np.zeros((9, 9, 3), np.uint8))])
        with pytest.raises(Refused, match="the policy server says: the request lacks the views"):
            client.infer({"prompt": "go"})
        assert client.infer(openpi_request(0.5))["actions"][0, 0] == 0.5


def test_a_lost_server_is_found_again():
    with running() as run:
        client = PolicyClient(run.url, timeout_seconds=30)
        assert client.infer(openpi_request(0.5))["actions"][0, 0] == 0.5
        port = run.port
    back = threading.Event()

    def restart() -> None:
        time.sleep(0.5)
        with running(contract=contract(latent_slots=5), port=port):
            back.wait(60)

    restarting = threading.Thread(target=restart, daemon=True)
    restarting.start()
    try:
        assert client.infer(openpi_request(0.25))["actions"][0, 0] == 0.25
        assert client.latent_slots == 5  # what it says of itself is read anew
    finally:
        client.close()
        back.set()
        restarting.join(30)


def test_waits_for_a_server_that_is_not_up_yet():
    """Until a server listens, connections are refused, although its port is taken."""
    with listener("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"ws://127.0.0.1:{port} in 0.5 s and \d+ tries"):
            PolicyClient(f"ws://127.0.0.1:{port}", timeout_seconds=0.5)
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}"):
            bound.listen()
            listener("127.0.0.1", port)


def test_gives_a_lost_server_up():
    with running() as run:
        client = PolicyClient(run.url, timeout_seconds=1)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer from the policy server at ws://"):
        client.infer(openpi_request())
    assert time.monotonic() - began < 10
    with running(FakePolicy(seconds=3)) as run, pytest.raises(ConnectionError, match="in 1 s"):
        PolicyClient(run.url, timeout_seconds=1).infer(openpi_request())


@pytest.mark.parametrize(
    ("url", "seconds", "told"),
    [
        ("127.0.0.1:8000", 1, "starts with ws:// or wss://"),
        ("ws://127.0.0.1:8000", 0, "timeout_seconds must be above 0"),
    ],
)
def test_refuses_a_wrong_call(url, seconds, told):
    with pytest.raises(ValueError, match=told):
        PolicyClient(url, timeout_seconds=seconds)
